"""A name's evaluation suite: versions scored on its data sets, once for each content of them.

Scores are kept with the version, as those of streams are (:mod:`orchestrator.suite`): what a stream
has measured under the same name on the same records is not measured again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clients.accounting import BudgetSpent
from clients.assignment import Assignment, DataSpec
from clients.evaluate import Evaluation
from clients.weights import ModelNotFound
from orchestrator.asking_clients import Noised, NotHeldOut, Question, keep, score
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.gate_file import GateFile, TestData
from orchestrator.gate_setting import refuse_private
from orchestrator.growing import is_beginning
from orchestrator.merge_draft import Draft
from orchestrator.merging import NotAModel
from orchestrator.signing import Unsigned, admitted
from orchestrator.stream import Task
from orchestrator.suite import TIMEOUT_S, column, prefix, with_labels
from orchestrator.versions import EvaluationFailed, use, using
from orchestrator.workspace import Workspace
from storage.lineage import Version

Scores = Mapping[str, Mapping[str, float]]
"""Metrics by data set; ``num_examples`` is among them."""

_UNUSABLE = (NotAModel, EvaluationFailed, ModelNotFound, Unsigned)
_UNASKED = (
    "clients are asked when a gate is, of versions that are committed: each time costs privacy"
)


@dataclass(frozen=True, slots=True)
class Scored:
    """A version's scores on a suite.

    Attributes:
        version: its id; empty for a merge that is not committed.
        scores: by data set, as far as they could be had.
        problems: why one could not, by data set.
    """

    version: str
    scores: Scores
    problems: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON."""
        return {
            "version": self.version,
            "scores": {name: dict(found) for name, found in self.scores.items()},
            "problems": dict(self.problems),
        }


def scored(
    workspace: Workspace,
    gate: GateFile,
    versions: Sequence[str],
    backend: Backend | None = None,
    *,
    charging: bool = False,
) -> dict[str, Scored]:
    """Return how versions score on a suite, by id; what is missing is measured, and kept.

    Args:
        workspace: where.
        gate: whose suite.
        versions: their ids.
        backend: where to evaluate; by default in this process.
        charging: whether clients may be asked for scores that they have not told, which costs.

    Raises:
        PrivateData: as :func:`refuse_private`.
        DataNotFound, BadDataURI: if a data set is not there.
    """
    refuse_private(gate.places, workspace.ledger)
    tasks = [task_of(name, one) for name, one in gate.suite.items() if one.data]
    asked_of_clients = {name: question_of(one) for name, one in gate.suite.items() if one.clients}
    found = [workspace.store.version(ref) for ref in dict.fromkeys(versions)]
    labels = max((tuple(v.recipe["model"]["labels"]) for v in found), key=len, default=())
    wanted: dict[str, tuple[Assignment, Version, Task]] = {}
    problems: dict[str, dict[str, str]] = {}
    for version in found:
        for task in tasks:
            if column(version.metrics, task):
                continue
            client = str(len(wanted))
            try:
                asked = _asked(workspace, version, task, labels)
            except _UNUSABLE as error:
                problems.setdefault(version.id, {})[task.name] = str(error)
            else:
                wanted[client] = (replace(asked, client=client), version, task)
    for name, data_set, reason in _measure(workspace, wanted, backend or InlineBackend()):
        problems.setdefault(name, {})[data_set] = reason
    for version in found:
        for name, question in asked_of_clients.items():
            if why := _told(workspace, version, (name, question), backend, charging):
                problems.setdefault(version.id, {})[name] = why
    return {
        version.id: Scored(
            version.id,
            _scores(workspace, version.id, tasks)
            | {
                name: kept
                for name, question in asked_of_clients.items()
                if (kept := _kept(workspace, version.id, name, question))
            },
            problems.get(version.id, {}),
        )
        for version in found
    }


def question_of(one: TestData) -> Question:
    """Return what a suite asks of clients."""
    assert one.clients is not None  # as is checked where the file is read
    assert one.epsilon is not None
    return Question(one.clients, Noised(one.epsilon, one.delta, one.unit, one.loss))


def _told(
    workspace: Workspace,
    version: Version,
    asked: tuple[str, Question],
    backend: Backend | None,
    charging: bool,
) -> str:
    """Ask clients, if that is to be, what they have not told; return why there are no scores."""
    name, question = asked
    hidden = "the noise hides all that clients told; give a larger epsilon"
    if kept := _kept(workspace, version.id, name, question):
        return "" if kept.keys() - {"num_examples"} else hidden
    if not charging:
        return _UNASKED
    try:
        found = score(workspace, version.id, question, backend=backend)
    except (*_UNUSABLE, NotHeldOut, BadConfig, BudgetSpent) as error:
        return str(error)
    keep(workspace, version.id, name, question, found)  # it is paid, whatever it tells
    return "" if found.mean else hidden


def _kept(workspace: Workspace, version: str, name: str, question: Question) -> dict[str, float]:
    """Return what clients told of a version, as it was kept; empty if they were not asked."""
    begins = question.prefix(name)
    metrics = workspace.store.version(version).metrics
    return {k.removeprefix(begins): v for k, v in metrics.items() if k.startswith(begins)}


def scored_draft(
    workspace: Workspace, gate: GateFile, made: Draft, backend: Backend | None = None
) -> Scored:
    """Return how a merge that is not committed scores on a suite; nothing of it is kept.

    Raises:
        PrivateData: as :func:`refuse_private`.
        DataNotFound, BadDataURI: if a data set is not there.
    """
    refuse_private(gate.places, workspace.ledger)
    version, tensors = made.version, made.effective(workspace.store)
    tasks = [task_of(name, one) for name, one in gate.suite.items() if one.data]
    assignments = []
    for task in tasks:
        assert task.test is not None  # each data set of a suite has one
        asked = using(workspace, version, tensors, task.test)
        assignments.append(replace(asked, client=task.name, answer_tokens=task.answer_tokens))
    scores: dict[str, dict[str, float]] = {}
    problems: dict[str, str] = {name: _UNASKED for name, one in gate.suite.items() if one.clients}
    for result in complete(backend or InlineBackend(), assignments, TIMEOUT_S, lambda asked: None):
        if isinstance(result, Failure):
            problems[result.client] = result.reason
        elif isinstance(result, Evaluation):
            scores[result.client], lost = _finite(result)
            problems |= {result.client: lost} if lost else {}
    return Scored("", scores, problems)


def _asked(
    workspace: Workspace, version: Version, task: Task, labels: tuple[str, ...]
) -> Assignment:
    """Return the evaluation of a version, among the labels of those it is compared with."""
    assert task.test is not None  # each data set of a suite has one
    asked = use(workspace, admitted(workspace, version.id), task.test)
    if is_beginning(asked.model.labels, labels):
        asked = with_labels(version, asked, labels)
    return replace(asked, answer_tokens=task.answer_tokens)


def task_of(name: str, one: TestData) -> Task:
    """Return a data set of a suite as a stream calls it."""
    assert one.data is not None  # who has clients instead is asked by a question
    spec = DataSpec(one.data, dict(one.fields), labels=one.labels)
    return Task(name, (), spec, answer_tokens=one.generate or 0)


def _measure(
    workspace: Workspace, wanted: Mapping[str, tuple[Assignment, Version, Task]], backend: Backend
) -> Iterator[tuple[str, str, str]]:
    """Evaluate what is asked, and keep it; yield of what could not be: version, data set, why."""
    assignments = [asked for asked, _, _ in wanted.values()]
    for result in complete(backend, assignments, TIMEOUT_S, lambda asked: None):
        _, version, task = wanted[result.client]
        if isinstance(result, Failure):
            yield version.id, task.name, result.reason
        elif isinstance(result, Evaluation):
            values, lost = _finite(result)
            before = prefix(task)
            workspace.store.record_metrics(version.id, {before + k: v for k, v in values.items()})
            if lost:
                yield version.id, task.name, lost


def _finite(found: Evaluation) -> tuple[dict[str, float], str]:
    """Return the scores that are numbers, with the count, and which are none; no bound holds NaN.

    A model that overflows has such a loss, or perplexity.
    """
    values = {key: value for key, value in found.metrics.items() if math.isfinite(value)}
    lost = [f"{key} is {found.metrics[key]}" for key in found.metrics if key not in values]
    return {**values, "num_examples": float(found.num_examples)}, ", ".join(lost)


def _scores(workspace: Workspace, version: str, tasks: Iterable[Task]) -> dict[str, Any]:
    metrics = workspace.store.version(version).metrics
    return {task.name: found for task in tasks if (found := column(metrics, task))}
