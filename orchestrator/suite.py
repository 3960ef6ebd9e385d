"""The evaluation suite of a stream: each of its versions scored on every task's held-back data.

Scores are kept with the version that was scored (:mod:`orchestrator.suite_metrics`), under a digest
of what was measured: a test set that changes is measured anew, one that streams share once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from clients import data
from clients.assignment import Assignment, DataSpec
from clients.evaluate import Evaluation
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.continual import Matrix
from orchestrator.gate_setting import refuse_private
from orchestrator.growing import grown, is_beginning
from orchestrator.signing import admitted
from orchestrator.stream import Stream, Task
from orchestrator.suite_metrics import SUITE
from orchestrator.versions import EvaluationFailed, use
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json
from storage.lineage import Version

TIMEOUT_S = 24 * 3600.0
AWARE = {"accuracy": "task_accuracy"}
"""What a metric is called where the model is told which task an example is of."""


@dataclass(frozen=True, slots=True)
class Row:
    """A version of a stream, as a row of its matrix.

    Attributes:
        trained: how many tasks it was trained on; 0 before training.
        version: its id.
        own: by task, the version that answers for it where the task is known; the version itself
            for those that are not named.
    """

    trained: int
    version: str
    own: Mapping[str, str]


def refuse_private_tests(workspace: Workspace, stream: Stream) -> None:
    """Refuse a stream that measures a task, or knows its inputs, by data of a client's own.

    Raises:
        PrivateData: as :func:`orchestrator.gate_setting.refuse_private`.
        clients.data.DataNotFound: if somebody has private data, and a test set is not there.
    """
    if all(client.public for client in workspace.ledger.clients()):
        return
    for task in stream.tasks:
        for one in (task.test, task.router):
            if one is not None:
                refuse_private({task.name: one.uri}, workspace.ledger)


def score(
    workspace: Workspace, stream: Stream, rows: Sequence[Row], backend: Backend | None = None
) -> int:
    """Measure what is missing of a stream's matrix, and return how many evaluations it took.

    Args:
        workspace: where the versions are.
        stream: whose tasks.
        rows: its versions.
        backend: where to evaluate; by default in this process.

    Raises:
        EvaluationFailed: if a version could not be scored, with the reason; what was measured
            before is kept.
        clients.data.DataNotFound: if a test set is not there.
    """
    columns = [*stream.tasks, *([stream.general] if stream.general else [])]
    prefixes = {task.name: prefix(task) for task in columns if task.test is not None}
    wanted: dict[str, tuple[Assignment, str, str]] = {}
    for version in dict.fromkeys(v for row in rows for v in (row.version, *row.own.values())):
        found = admitted(workspace, version)
        for task in columns:
            if task.test is None or _has(found, prefixes[task.name]):
                continue
            client = f"{len(wanted)}"
            asked = replace(
                asked_of(workspace, found, task.test, stream),
                client=client,
                answer_tokens=task.answer_tokens,
            )
            wanted[client] = (asked, version, prefixes[task.name])
    assignments = [asked for asked, _, _ in wanted.values()]
    used = backend or InlineBackend()
    for result in complete(used, assignments, TIMEOUT_S, lambda asked: None):
        if isinstance(result, Failure):
            raise EvaluationFailed(f"the version cannot be scored: {result.reason}")
        if isinstance(result, Evaluation):
            _, version, before = wanted[result.client]
            values = {**result.metrics, "num_examples": float(result.num_examples)}
            workspace.store.record_metrics(version, {before + k: v for k, v in values.items()})
    return len(assignments)


def matrix(
    workspace: Workspace, stream: Stream, rows: Sequence[Row], told_task: bool = False
) -> Matrix:
    """Return a stream's scores, as far as they were measured.

    Args:
        workspace: where the versions are.
        stream: whose tasks and metric.
        rows: its versions, in order.
        told_task: whether the model is told which task an example is of: then only the task's
            labels may be answered, and where each task has an adapter of its own, that one answers.
    """
    tested = [task for task in stream.tasks if task.test is not None]
    scores = []
    for row in rows:
        found = [answered(workspace, stream, row, task, told_task) for task in tested]
        scores.append(tuple(None if one is None else one[0] for one in found))
    return Matrix(
        tuple(task.name for task in tested),
        tuple(row.trained for row in rows),
        tuple(scores),
        stream.lower_is_better,
    )


def answered(
    workspace: Workspace, stream: Stream, row: Row, task: Task, told_task: bool = False
) -> tuple[float, int] | None:
    """Return a row's score on a task and the number of examples; None if it was not measured.

    Args:
        workspace: where the versions are.
        stream: whose metric.
        row: the version.
        task: one that has a test set.
        told_task: as for :func:`matrix`.
    """
    version = row.own.get(task.name, row.version) if told_task else row.version
    found = column(workspace.store.version(version).metrics, task)
    aware = AWARE.get(stream.metric, stream.metric)
    value = found.get(aware if told_task else stream.metric, found.get(stream.metric))
    return None if value is None else (value, int(found["num_examples"]))


def general_perplexity(
    workspace: Workspace, stream: Stream, rows: Sequence[Row]
) -> list[float | None]:
    """Return each row's perplexity on the stream's general text; None where it was not measured."""
    if stream.general is None:
        return []
    metrics = [workspace.store.version(row.version).metrics for row in rows]
    return [column(one, stream.general).get("perplexity") for one in metrics]


def prefix(task: Task) -> str:
    """Return what the metrics of a task's column begin with.

    Raises:
        clients.data.DataNotFound: if its test set is not there.
    """
    spec = task.test
    assert spec is not None
    facts = {
        "content": data.content_of(spec.uri),
        "fields": dict(spec.fields),
        "labels": list(spec.labels),
        **({"answer_tokens": task.answer_tokens} if task.answer_tokens else {}),
    }
    digest = hashlib.sha256(canonical_json(facts, "a test set").encode()).hexdigest()[:12]
    return f"{SUITE}{task.name}@{digest}/"


def column(metrics: Mapping[str, float], task: Task) -> dict[str, float]:
    """Return what of a version's metrics is of a task; empty if it was not measured.

    Where the test set is not there any more, the one that was measured is taken, if it is one.
    """
    begins = f"{SUITE}{task.name}@"
    try:
        wanted = prefix(task)
    except data.DataNotFound:
        known = {key.rpartition("/")[0] + "/" for key in metrics if key.startswith(begins)}
        wanted = known.pop() if len(known) == 1 else ""
    if not wanted:
        return {}
    return {k.removeprefix(wanted): v for k, v in metrics.items() if k.startswith(wanted)}


def _has(version: Version, before: str) -> bool:
    return f"{before}num_examples" in version.metrics


def asked_of(workspace: Workspace, version: Version, test: DataSpec, stream: Stream) -> Assignment:
    """Return the evaluation of a version on a task that it may never have heard of.

    Labels that came later have rows as they would begin with; they are not answered.
    """
    return with_labels(version, use(workspace, version, test), stream.labels)


def with_labels(version: Version, asked: Assignment, labels: tuple[str, ...]) -> Assignment:
    """Return the evaluation of a version on data that have more labels than it knows.

    Raises:
        BadConfig: if ``labels`` do not begin with those that it knows.
    """
    old = asked.model.labels
    if not old or old == labels:
        return asked
    if not is_beginning(old, labels):
        raise BadConfig(
            f"version {version.id[:12]} has the label set {_listed(old)}, and what it is scored "
            f"with {_listed(labels)}, which does not begin with it"
        )
    seed = int(version.recipe.get("seed") or 0)
    return replace(
        asked,
        model=replace(asked.model, labels=labels),
        broadcast=replace(
            asked.broadcast, tensors=grown(asked.broadcast.tensors, old, labels, seed)
        ),
    )


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(labels)
