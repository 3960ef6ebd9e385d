"""Where a run starts: the first tensors of its adapter and head, computed once, before round 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clients import data
from clients.assignment import NO_DATA, Assignment
from clients.initialisations import OFFSET, InitInputs
from clients.session import Session, allowed_labels, move, opened
from clients.trainer import NothingToTrain
from clients.weights import stored_tensor
from strategies.base import Update


def initial_update(assignment: Assignment) -> Update:
    """Return the adapter's and head's first tensors, and the offset's with ``offset/`` before.

    They follow from the assignment's seed and, where the adapter reads some, from the assignment's
    data: its first ``num_examples`` of a seeded order. These must be public, the result is sent as
    it is; only an assignment whose action is ``init`` names such data.

    Raises:
        NothingToTrain: if it names data and they hold no example.
        strategies.plugins.BadOptions: if the adapter cannot start so on this base model.
    """
    read: list[data.Example] = []
    if assignment.action == "init" and assignment.data != NO_DATA:
        read = _sampled(data.examples(assignment.data, assignment.model), assignment)
        if not read:
            raise NothingToTrain("init_data holds no example for this task; give data that do")
    with opened(assignment) as session:
        encoded = data.encode(read, session.base.tokenizer, assignment.model)
        offset = session.adapter.initialise(
            session.model.backbone,
            InitInputs(
                session.model,
                batches=lambda size: list(_batches(assignment, session, encoded, size)),
                losses=lambda batch: _losses(assignment, session, batch),
                weight=lambda name: stored_tensor(assignment.model, name),
            ),
        )
        tensors = {**session.read(), **{OFFSET + name: t for name, t in offset.items()}}
    return Update(
        client=assignment.client,
        round=0,
        base="",
        tensors=tensors,
        num_examples=len(read),
        fingerprint=data.fingerprint(assignment.data, read, None) if read else "",
    )


def initial_tensors(assignment: Assignment) -> dict[str, Tensor]:
    """Return the tensors of :func:`initial_update`."""
    return dict(initial_update(assignment).tensors)


def _sampled(examples: list[data.Example], assignment: Assignment) -> list[data.Example]:
    """Return so many examples as are asked for, drawn by seed: a file may be sorted by label."""
    generator = torch.Generator().manual_seed(assignment.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [examples[i] for i in sorted(order[: assignment.num_examples])]


def _batches(
    assignment: Assignment, session: Session, encoded: Sequence[data.Encoded], size: int
) -> Iterator[data.Batch]:
    pad = data.padding_id(session.base.tokenizer)
    for start in range(0, len(encoded), size):
        yield move(data.collate(encoded[start : start + size], pad), assignment.device)


def _losses(assignment: Assignment, session: Session, batch: data.Batch) -> Tensor:
    logits = session.model(batch)
    return session.model.example_losses(logits, batch, allowed_labels(assignment))
