"""A base model with an adapter attached for one assignment, and given back as it was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients import models
from clients.adapters import ADAPTERS, Adapter
from clients.assignment import Assignment
from clients.data import Batch
from strategies.base import Tensors


@dataclass(frozen=True, slots=True)
class Session:
    """One assignment's model, ready to run.

    Attributes:
        base: the resident base model and its tokenizer.
        model: base, adapter and head as one module.
        adapter: the adapter method that is attached.
    """

    base: models.Base
    model: models.TaskModel
    adapter: Adapter

    def read(self) -> dict[str, Tensor]:
        """Return a copy of adapter and head tensors by weft's names."""
        return {**self.adapter.read(self.model.backbone), **self.model.head_tensors()}

    def write(self, tensors: Tensors) -> None:
        """Put adapter and head tensors into the model."""
        head = {k: v for k, v in tensors.items() if k.startswith("head.")}
        self.adapter.write(self.model.backbone, {k: v for k, v in tensors.items() if k not in head})
        if head:
            self.model.write_head(head)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live parameters of adapter and head by weft's names."""
        return {**self.adapter.parameters(self.model.backbone), **self.model.head_parameters()}

    def outputs_with(self, tensors: Tensors, batch: Batch) -> Tensor:
        """Return the logits of a batch with another adapter and head, in evaluation mode.

        Leaves no trace: no gradient, no random number drawn, and every parameter the same object
        with the same memory, so that optimizers and measured gradients know nothing of it.

        Args:
            tensors: of the same adapter, as :meth:`read` returns them.
            batch: on the model's device.

        Raises:
            ValueError: if they are of another shape.
        """
        live, modes = self.parameters(), {m: m.training for m in self.model.modules()}
        own = {name: parameter.data for name, parameter in live.items()}
        for name, data in own.items():
            if name not in tensors or tensors[name].shape != data.shape:
                found = list(tensors[name].shape) if name in tensors else "none"
                raise ValueError(f"{name} must be {list(data.shape)} in a teacher, got {found}")
        try:
            for name, parameter in live.items():
                parameter.data = tensors[name].to(own[name])
            self.model.eval()
            with torch.no_grad():
                outputs: Tensor = self.model(batch)
        finally:
            for name, parameter in live.items():
                parameter.data = own[name]
            for module, training in modes.items():
                module.training = training
        return outputs


@contextmanager
def opened(assignment: Assignment) -> Iterator[Session]:
    """Attach the assignment's adapter to the resident base model; detach it on leaving.

    The base model is then in evaluation mode, as it was loaded.

    Raises:
        clients.models.ModelNotFound: if the base model is not there.
        clients.models.BaseMismatch: if it is not the one the assignment names.
    """
    torch.set_num_threads(assignment.threads)
    base = models.load(assignment.model, assignment.device)
    adapter = _adapter(assignment)
    torch.manual_seed(assignment.seed)
    attached = adapter.attach(base.backbone, assignment.underlay)
    try:
        model = models.TaskModel(attached, assignment.model)
        model.to(assignment.device)
        yield Session(base, model, adapter)
    finally:
        adapter.detach(attached)
        base.backbone.eval()  # what is attached next is in the mode of its backbone


def _adapter(assignment: Assignment) -> Adapter:
    choice = assignment.adapter
    adapter: Adapter = ADAPTERS.get(choice.name).build(**choice.options)
    return adapter


def trained_names(assignment: Assignment, names: list[str]) -> list[str]:
    """Return which of ``names`` this assignment trains, sorted."""
    pattern = re.compile(assignment.broadcast.trainable)
    frozen = re.compile(_adapter(assignment).frozen)
    return sorted(
        name
        for name in names
        if pattern.fullmatch(name)
        and not frozen.fullmatch(name)
        and not name.endswith(".scaling")
        and not (assignment.head == "freeze" and name.startswith("head."))
    )


def returned_names(assignment: Assignment) -> list[str]:
    """Return the names of the tensors that an Update of this assignment carries, sorted."""
    names = trained_names(assignment, list(assignment.broadcast.tensors))
    kept = personal_names(assignment, names)
    return [name for name in names if name not in kept]


def personal_names(assignment: Assignment, names: Iterable[str]) -> frozenset[str]:
    """Return which of ``names`` are the client's own and stay with it."""
    pattern, own_head = re.compile(assignment.broadcast.personal), assignment.head == "personal"
    return frozenset(
        n for n in names if pattern.fullmatch(n) or (own_head and n.startswith("head."))
    )


def allowed_labels(assignment: Assignment) -> Tensor | None:
    """Return the indices of the labels that take part in the softmax, or None for all."""
    if not assignment.labels or set(assignment.labels) == set(assignment.model.labels):
        return None
    return torch.tensor([assignment.model.labels.index(name) for name in assignment.labels])


def move(batch: Batch, device: str) -> Batch:
    """Return ``batch`` on ``device``."""
    return batch if device == "cpu" else batch.to(device)
