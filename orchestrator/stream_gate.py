"""Whether a version of a stream's suite lets a past task fall: for people, and for gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.backends.base import Backend
from orchestrator.config import BadConfig
from orchestrator.continual import Fall, Share, Verdict, fallen, verdict_of
from orchestrator.stream import Stream
from orchestrator.streaming import recorded, rows, steps
from orchestrator.suite import Row, answered, score
from orchestrator.workspace import Workspace

SHARES = ("accuracy", "exact_match")
"""Metrics that are the share of examples answered right."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What is asked of a version.

    Attributes:
        tolerance: the largest fall of any past task that is allowed, in [0, 1].
        confidence: of the two-sided intervals, in (0, 1).
        told_task: whether the model is told which task an example is of.
        against: the version that there is; None for the one that each task was learned with.
    """

    tolerance: float
    confidence: float = 0.95
    told_task: bool = False
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """What a gate found.

    Attributes:
        stream: the stream whose suite it is.
        version: the version that was checked.
        gate: what was asked.
        falls: of each past task.
    """

    stream: str
    version: str
    gate: Gate
    falls: tuple[Fall, ...]

    @property
    def verdict(self) -> Verdict:
        """What all tasks together say."""
        return verdict_of(self.falls)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {**asdict(self), "verdict": self.verdict}


def check(
    workspace: Workspace,
    name: str,
    gate: Gate,
    ref: str | None = None,
    backend: Backend | None = None,
) -> Checked:
    """Return by how much the past tasks of a stream fell in a version; what is missing is scored.

    Past tasks are all but the newest that is done; with ``gate.against`` all that are done.

    Args:
        workspace: where.
        name: the stream's.
        gate: what is asked.
        ref: the version; by default the stream's newest.
        backend: where to evaluate; by default in this process.

    Raises:
        UnknownStream, UnknownVersion: if there is none of this name.
        BadConfig: if no task is done or has a test set, or the metric is no share of right answers.
        EvaluationFailed: if a version could not be scored.
    """
    stream = recorded(workspace, name)
    words = stream.stages[-1].document.get("task") == "token-classification"
    if words or stream.metric not in SHARES:
        raise BadConfig(
            f"stream {name!r} is measured by {stream.metric}{' of words' if words else ''}, whose "
            "interval does not follow from the size of a test set; a fall is checked of "
            f"{' or '.join(SHARES)} of whole examples"
        )
    lines = rows(workspace, stream, steps(workspace, stream))
    done = lines[-1].trained if lines else 0
    candidate = _line(workspace, ref, lines, done)
    there = None if gate.against is None else _line(workspace, gate.against, lines, done)
    past = done if there else done - 1
    tested = [t.name for t in stream.tasks[:past] if t.test is not None]
    if candidate is None or not tested:
        raise BadConfig(
            f"stream {name!r} has no past task with a test set, so that nothing can have fallen; "
            "give its tasks evaluate, and train more than one"
        )
    score(workspace, stream, [*lines, candidate, *([there] if there else [])], backend)
    falls = []
    for number, task in enumerate(stream.tasks[:past], 1):
        if task.test is None:
            continue
        learned = there or next(row for row in lines if row.trained >= number)
        before, after = (_share(workspace, stream, gate, r, number) for r in (learned, candidate))
        falls.append(fallen(task.name, before, after, gate.tolerance, gate.confidence))
    return Checked(name, candidate.version, gate, tuple(falls))


def _line(workspace: Workspace, ref: str | None, lines: Sequence[Row], done: int) -> Row | None:
    """Return a version as a row: one of the stream's own, or any other's."""
    if ref is None:
        return lines[-1] if lines else None
    version = workspace.store.version(ref).id
    return next((row for row in lines if row.version == version), Row(done, version, {}))


def _share(workspace: Workspace, stream: Stream, gate: Gate, row: Row, number: int) -> Share:
    found = answered(workspace, stream, row, stream.tasks[number - 1], gate.told_task)
    assert found is not None  # it was scored just now
    return Share(*found)
