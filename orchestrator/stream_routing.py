"""A stream whose inputs choose their adapter: nobody says the task, a router does.

Where each task has an adapter of its own, an input is answered by that of the task it is most like.
What it is like is judged in the base model's own features, by data of each task that are public: a
client's are never read for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clients import data
from clients.assignment import ModelSpec
from clients.evaluate import answer_scores, label_scores, predicted, tag_scores
from clients.routing import Router, embedded, router
from orchestrator.continual import Matrix
from orchestrator.signing import admitted
from orchestrator.stream import Stream, Task
from orchestrator.suite import Row, asked_of, column, prefix
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json


def route(workspace: Workspace, stream: Stream, rows: Sequence[Row]) -> int:
    """Measure what is missing of a stream's routed scores; return of how many versions it was.

    Each is kept with the version of its row: ``routed-DIGEST/METRIC`` is what an evaluation says of
    the answers, ``routed-DIGEST/routing`` the share of examples whose task was found. The digest is
    of the adapters that answer and of what the router is made of.
    """
    if not stream.routed:
        return 0
    tested = [task for task in stream.tasks if task.test is not None]
    missing = [
        row
        for row in rows
        if row.own and any(stream.metric not in _found(workspace, stream, row, t) for t in tested)
    ]
    if not missing:
        return 0
    asking = _Asking(workspace, stream, missing[-1])
    for task in tested:
        inputs = asking.test(task)
        for row in missing:
            chosen = asking.router.route(inputs, row.trained).tolist()
            said = [asking.answers(number, task)[i] for i, number in enumerate(chosen)]
            own = stream.tasks.index(task)
            found = sum(number == own for number in chosen) / len(chosen)
            scores = {**asking.scores(task, said), "routing": found}
            before = f"{prefix(task)}{_digest(stream, row)}/"
            workspace.store.record_metrics(row.version, {before + k: v for k, v in scores.items()})
    return len(missing)


def routed_matrix(workspace: Workspace, stream: Stream, rows: Sequence[Row]) -> Matrix:
    """Return the scores where a router chooses the adapter; before training there is none."""
    tested = tuple(task for task in stream.tasks if task.test is not None)
    trained = [row for row in rows if row.own]
    scores = [
        tuple(_found(workspace, stream, row, task).get(stream.metric) for task in tested)
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
    _answers: dict[tuple[int, str], list[Any]] = field(default_factory=dict, init=False)
    _examples: dict[str, list[data.Example]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        tasks = self.stream.tasks[: self.last.trained]
        found = [task.router for task in tasks if task.router is not None]
        version = admitted(self.workspace, self.last.version)
        self._spec = asked_of(self.workspace, version, found[0], self.stream).model
        self.router = router(self._spec, [data.examples(spec, self._spec) for spec in found])

    def test(self, task: Task) -> Tensor:
        """Return a test set's features, ``[examples, hidden]``."""
        assert task.test is not None
        self._examples[task.name] = data.examples(task.test, self._spec)
        return embedded(self._spec, self._examples[task.name])

    def answers(self, number: int, task: Task) -> list[Any]:
        """Return what the adapter of a task, by its number, answers to all of a test set."""
        key = number, task.name
        if key not in self._answers:
            owner = self.stream.tasks[number]
            assert task.test is not None
            version = admitted(self.workspace, self.last.own[owner.name])
            asked = asked_of(self.workspace, version, task.test, self.stream)
            labels = owner.labels or asked.labels
            asked = replace(asked, labels=labels, answer_tokens=task.answer_tokens)
            self._answers[key] = predicted(asked, self._examples[task.name])
        return self._answers[key]

    def scores(self, task: Task, said: Sequence[Any]) -> dict[str, float]:
        """Return what an evaluation would say of answers to a test set."""
        examples, names = self._examples[task.name], self._spec.labels
        if self._spec.kind == "causal-lm":
            return answer_scores(examples, said)
        if self._spec.kind == "token-classification":
            return tag_scores(examples, said, names)[0]
        truth = torch.tensor([example.label for example in examples])
        return label_scores(torch.tensor(said), truth, names)[0]


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
