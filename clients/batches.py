"""Which examples are in which step of an assignment, and the tensors that they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from clients import data
from clients.assignment import Assignment
from clients.noise import NoiseStream
from clients.session import Session, move
from clients.units import OfUnits, packed
from strategies.base import Tensors


@dataclass(frozen=True, slots=True)
class Batches:
    """An assignment's examples, as its steps have them.

    Attributes:
        assignment: how many steps, of how many examples.
        session: where they are computed with.
        encoded: all examples.
        teachers: by regularizer, the tensors of the model whose outputs it compares with, or none.
        heard: called before each microbatch.
        alone: whether a forward pass holds one example, or those of one unit. So where gradients
            must be measured alone: in such a model an example may change what is computed of
            another beside it, and no teacher and no report may see two at once.
    """

    assignment: Assignment
    session: Session
    encoded: Sequence[data.Encoded]
    teachers: Mapping[str, Tensors]
    heard: Callable[[], None]
    alone: bool = False

    @property
    def _held(self) -> int:
        return 1 if self.alone else self.assignment.microbatch

    @property
    def num_steps(self) -> int:
        """How many steps the assignment has."""
        a = self.assignment
        return a.steps or math.ceil(a.epochs * math.ceil(len(self.encoded) / a.batch_size))

    def shuffled(self, first: int) -> Iterator[list[int]]:
        """Yield the indices of each step's examples, from step ``first`` on: passes over all."""
        a = self.assignment
        generator = torch.Generator().manual_seed(a.seed)
        order: list[int] = []
        for step in range(self.num_steps):
            if not order:
                order = torch.randperm(len(self.encoded), generator=generator).tolist()
            if step >= first:
                yield order[: a.batch_size]
            order = order[a.batch_size :]

    def drawn(
        self,
        stream: NoiseStream,
        step: int,
        units: Sequence[Sequence[int]] | None,
        per_unit: int = 1,
    ) -> list[list[int]]:
        """Return a step's Poisson sample: of each unit in it at most so many examples.

        Args:
            stream: of the client's secret.
            step: each is drawn anew.
            units: the indices of each unit's examples; None where each is a unit by itself.
            per_unit: >= 1.
        """
        assert self.assignment.privacy is not None
        rate = self.assignment.privacy.sample_rate
        if units is None:
            return [[int(i)] for i in stream.poisson_sample(step, len(self.encoded), rate)]
        whole = [units[int(i)] for i in stream.poisson_sample(step, len(units), rate)]
        picked = stream.pick(step, [len(one) for one in whole], per_unit)
        return [[one[i] for i in some] for one, some in zip(whole, picked, strict=True)]

    def parts(self, indices: Sequence[int]) -> Iterator[data.Batch]:
        """Yield examples in parts of like length: the same sum of gradients, less padding."""
        for chosen in data.by_length(self.encoded, indices, self._held):
            self.heard()
            yield self.collated(chosen)

    def parts_of_units(self, drawn: Sequence[Sequence[int]]) -> Iterator[OfUnits[data.Batch]]:
        """Yield the examples of units in parts, each unit whole."""
        lengths = {i: len(self.encoded[i].input_ids) for unit in drawn for i in unit}
        for part in packed(drawn, lengths, self._held):
            self.heard()
            chosen = [index for unit in part for index in unit]
            yield OfUnits(self.collated(chosen), [len(unit) for unit in part])

    def collated(self, indices: Sequence[int]) -> data.Batch:
        """Return examples as one batch, with what teachers say of them."""
        pad = data.padding_id(self.session.base.tokenizer)
        batch = move(data.collate([self.encoded[i] for i in indices], pad), self.assignment.device)
        taught = {
            f"{name}/outputs": self.session.outputs_with(teacher, batch)
            for name, teacher in self.teachers.items()
            if teacher
        }
        return replace(batch, taught=taught) if taught else batch
