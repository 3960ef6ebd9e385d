"""A stream whose inputs choose their adapter: nobody says the task, a router does.

Where each task has an adapter of its own, an input is answered by that of the task it is most like.
What it is like is judged in the base model's own features, by data of each task that are public: a
client's are never read for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clients import data
from clients.assignment import ModelSpec
from clients.routing import Router, embedded, predicted, router
from orchestrator.continual import Matrix
from orchestrator.signing import admitted
from orchestrator.stream import Stream, Task
from orchestrator.suite import Row, asked_of, column, prefix
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json


def route(workspace: Workspace, stream: Stream, rows: Sequence[Row]) -> int:
    """Measure what is missing of a stream's routed scores; return of how many versions it was.

    Each is kept with the version of its row: ``routed-DIGEST/accuracy`` is the share of examples
    that are answered right, ``routed-DIGEST/routing`` that of examples whose task was found. The
    digest is of the adapters that answer and of what the router is made of.
    """
    if not stream.routed:
        return 0
    tested = [task for task in stream.tasks if task.test is not None]
    missing = [
        row
        for row in rows
        if row.own and any(not _found(workspace, stream, row, t) for t in tested)
    ]
    if not missing:
        return 0
    asking = _Asking(workspace, stream, missing[-1])
    for task in tested:
        inputs, truth = asking.test(task)
        for row in missing:
            chosen = asking.router.route(inputs, row.trained)
            said = torch.empty_like(truth)
            for number in sorted(set(chosen.tolist())):
                here = chosen == number
                said[here] = asking.answers(number, task)[here]
            own = stream.tasks.index(task)
            scores = {
                "accuracy": float((said == truth).double().mean()),
                "routing": float((chosen == own).double().mean()),
            }
            before = f"{prefix(task)}{_digest(stream, row)}/"
            workspace.store.record_metrics(row.version, {before + k: v for k, v in scores.items()})
    return len(missing)


def routed_matrix(workspace: Workspace, stream: Stream, rows: Sequence[Row]) -> Matrix:
    """Return the scores where a router chooses the adapter; before training there is none."""
    tested = tuple(task for task in stream.tasks if task.test is not None)
    trained = [row for row in rows if row.own]
    scores = [
        tuple(_found(workspace, stream, row, task).get("accuracy") for task in tested)
        for row in trained
    ]
    names = tuple(task.name for task in tested)
    return Matrix(names, tuple(row.trained for row in trained), tuple(scores))


@dataclass(slots=True)
class _Asking:
    """What a stream's adapters answer to test sets, each asked once.

    Attributes:
        workspace: where the versions are.
        stream: whose.
        last: the row with most adapters.
    """

    workspace: Workspace
    stream: Stream
    last: Row
    router: Router = field(init=False)
    _spec: ModelSpec = field(init=False)
    _answers: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False)
    _examples: dict[str, list[data.Example]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        tasks = self.stream.tasks[: self.last.trained]
        found = [task.router for task in tasks if task.router is not None]
        version = admitted(self.workspace, self.last.version)
        self._spec = asked_of(self.workspace, version, found[0], self.stream).model
        self.router = router(self._spec, [data.examples(spec, self._spec) for spec in found])

    def test(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return a test set's features, ``[examples, hidden]``, and its labels' indices."""
        assert task.test is not None
        examples = data.examples(task.test, self._spec)
        self._examples[task.name] = examples
        return embedded(self._spec, examples), torch.tensor([one.label for one in examples])

    def answers(self, number: int, task: Task) -> Tensor:
        """Return what the adapter of a task, by its number, answers to all of a test set."""
        key = number, task.name
        if key not in self._answers:
            owner = self.stream.tasks[number]
            assert task.test is not None
            version = admitted(self.workspace, self.last.own[owner.name])
            asked = asked_of(self.workspace, version, task.test, self.stream)
            labels = owner.labels or asked.labels
            self._answers[key] = predicted(replace(asked, labels=labels), self._examples[task.name])
        return self._answers[key]


def _found(workspace: Workspace, stream: Stream, row: Row, task: Task) -> Mapping[str, float]:
    """Return a row's routed scores on a task; empty where they were not measured."""
    before = f"{_digest(stream, row)}/"
    scores = column(workspace.store.version(row.version).metrics, task)
    return {k.removeprefix(before): v for k, v in scores.items() if k.startswith(before)}


def _digest(stream: Stream, row: Row) -> str:
    made_of = [
        [row.own[task.name], data.content_of(task.router.uri), dict(task.router.fields)]
        for task in stream.tasks[: row.trained]
        if task.router is not None
    ]
    digest = hashlib.sha256(canonical_json(made_of, "a router").encode()).hexdigest()[:12]
    return f"routed-{digest}"
