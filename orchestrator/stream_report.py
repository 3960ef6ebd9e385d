"""Streams as people read them: how each task stands, and the matrix of what was kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.continual import Matrix, intransigence
from orchestrator.stream import Stream
from orchestrator.stream_forecast import StreamForecast, TaskForecast
from orchestrator.stream_gate import Checked
from orchestrator.stream_routing import routed_matrix
from orchestrator.streaming import Step, recorded, rows, steps
from orchestrator.suite import general_perplexity, matrix
from orchestrator.workspace import Workspace

MEASURES: Mapping[str, str] = {
    "average": "average after the last task",
    "backward_transfer": "backward transfer (GEM)",
    "forward_transfer": "forward transfer (GEM, over the untrained model)",
    "forgetting": "forgetting (Chaudhry, from the best before the last)",
    "learning_accuracy": "when it was learned",
    "intransigence": "intransigence (below the ceiling when learned)",
}
"""The measures by their names in JSON, and what they are called."""


@dataclass(frozen=True, slots=True)
class StreamReport:
    """A stream and what its versions know.

    Attributes:
        stream: the stream.
        steps: how each task stands.
        task_free: the matrix where any label seen so far may be answered.
        task_aware: the matrix where the model is told which task an example is of.
        ceiling: the matrices, likewise, of joint training; None where none was named.
        general: the perplexity on text of no task, by the matrix's rows; empty where none is given.
        routed: the matrix where a router chooses the adapter that answers; None without one.
    """

    stream: Stream
    steps: tuple[Step, ...]
    task_free: Matrix
    task_aware: Matrix
    ceiling: tuple[Matrix, Matrix] | None = None
    general: tuple[float | None, ...] = ()
    routed: Matrix | None = None

    @property
    def matrices(self) -> dict[str, tuple[Matrix, Matrix | None]]:
        """The matrices that differ, by what the model is told, each with its ceiling."""
        free, aware = self.ceiling or (None, None)
        found: dict[str, tuple[Matrix, Matrix | None]] = {"task-free": (self.task_free, free)}
        if self.task_aware != self.task_free:
            found["task-aware"] = (self.task_aware, aware)
        if self.routed is not None:
            found["routed"] = (self.routed, free)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {
            "stream": self.stream.name,
            "metric": self.stream.metric,
            "start": self.stream.start,
            "labels": list(self.stream.labels),
            "tasks": [step.to_json() for step in self.steps],
            "general_perplexity": list(self.general),
            "matrices": {
                told: {
                    **found.to_json(),
                    "intransigence": ceiling and intransigence(found, ceiling),
                }
                for told, (found, ceiling) in self.matrices.items()
            },
        }


def report(workspace: Workspace, name: str, ceiling: str | None = None) -> StreamReport:
    """Return a stream, by its name, and what was measured of it; measures nothing.

    Args:
        workspace: where.
        name: the stream's.
        ceiling: name of the stream of joint training to hold it against.

    Raises:
        UnknownStream: if there is none of this name.
    """
    stream = recorded(workspace, name)
    found = steps(workspace, stream)
    above = None if ceiling is None else report(workspace, ceiling)
    lines = rows(workspace, stream, found)
    return StreamReport(
        stream,
        tuple(found),
        matrix(workspace, stream, lines),
        matrix(workspace, stream, lines, told_task=True),
        None if above is None else (above.task_free, above.task_aware),
        tuple(general_perplexity(workspace, stream, lines)),
        routed_matrix(workspace, stream, lines) if stream.routed else None,
    )


def line(workspace: Workspace, name: str) -> dict[str, Any]:
    """Return one stream as a line of a list."""
    found = report(workspace, name)
    document = found.to_json()
    done = [step.result for step in found.steps if step.version is not None]
    return {
        "stream": name,
        "tasks": len(found.stream.tasks),
        "done": len(done),
        "version": done[-1] if done else None,
        "metric": found.stream.metric,
        "average": document["matrices"]["task-free"]["average"],
        "forgetting": document["matrices"]["task-free"]["forgetting"],
    }


def streams_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return streams, a line each."""
    table = Table("stream", "tasks done", "version", "metric", "average", "forgetting")
    for one in lines:
        numbers = (_number(one["average"]), _number(one["forgetting"]))
        facts = (one["stream"], f"{one['done']}/{one['tasks']}", (one["version"] or "-")[:12])
        table.add_row(*(escape(text) for text in (*facts, one["metric"], *numbers)))
    return table


def show(found: StreamReport, console: Console) -> None:
    """Print a stream: its tasks, then each matrix with its measures."""
    console.print(steps_table(found.steps))
    if found.general:
        console.print(general_line(found), highlight=False)
    for told, (scores, ceiling) in found.matrices.items():
        if not scores.rows or not scores.tasks:
            continue
        console.print(matrix_table(scores, f"{found.stream.metric}, {told}"))
        gap = None if ceiling is None else intransigence(scores, ceiling)
        values = {**scores.to_json(), "intransigence": gap}
        for key, called in MEASURES.items():
            if values[key] is not None:
                console.print(f"{called:56s} {values[key]:.4f}", highlight=False)


def general_line(found: StreamReport) -> str:
    """Return what became of the perplexity on general text."""
    return "perplexity on general text: " + ", ".join(
        f"{_number(value)} after {after or 'nothing'}"
        for after, value in zip(found.task_free.after, found.general, strict=True)
    )


def steps_table(found: Sequence[Step]) -> Table:
    """Return how the tasks of a stream stand, a line each."""
    table = Table("task", "status", "run", "version", "error")
    for step in found:
        run = "-" if step.record is None else step.record.id
        error = "" if step.record is None else step.record.error or ""
        facts = (step.stage.name, step.status, run, (step.result or "-")[:12], error)
        table.add_row(*(escape(text) for text in facts))
    return table


def matrix_table(scores: Matrix, title: str) -> Table:
    """Return an accuracy matrix: a row a version, a column a task."""
    table = Table("after", *(escape(task) for task in scores.tasks), title=escape(title))
    for after, row in zip(scores.after, scores.rows, strict=True):
        name = "nothing" if after == 0 else f"{after} tasks" if after > 1 else "1 task"
        table.add_row(name, *(_number(value) for value in row))
    return table


def falls_table(found: Checked) -> Table:
    """Return by how much each past task fell, a line each."""
    level = f"{found.gate.confidence:.0%} interval"
    table = Table("past task", "fell by", level, "verdict")
    for one in found.falls:
        interval = f"{one.low:+.3f} to {one.high:+.3f}"
        table.add_row(escape(one.task), f"{one.fall:+.3f}", interval, one.verdict)
    return table


def verdict_line(found: Checked) -> str:
    """Return in a sentence whether a version may follow."""
    what = f"{found.version[:12]}, tolerance {found.gate.tolerance:g}"
    return {
        "holds": f"{what}: no past task fell by more",
        "falls": f"{what}: a past task fell by more",
        "unclear": f"{what}: a past task may have fallen by more; its test set is too small to say",
    }[found.verdict]


def task_line(task: TaskForecast) -> str:
    """Return how a task of a forecast stands, in a sentence."""
    if not task.rounds:
        return f"{task.name}: given, so that the stream spends nothing on it"
    bound = "" if task.private else ", without DP: no ε bounds what it tells"
    return f"{task.name}: {task.status}, {task.rounds} rounds{bound}"


def forecast_table(found: StreamForecast) -> Table:
    """Return what a stream would spend, a line each population: task by task, and in all."""
    names = [task.name for task in found.tasks if task.private]
    table = Table("population", *map(escape, names), "stream", "with all else", "budget", "left")
    for total in found.totals:
        shown = total.task
        alone = [
            next((f"{share.task.epsilon:.2f}" for share in task.shares if share.is_of(total)), "-")
            for task in found.tasks
            if task.private
        ]
        whole = f"{total.stream.epsilon:.2f}", f"{total.whole.epsilon:.2f}"
        limit = ("-", "-") if total.left is None else (f"{total.budget:g}", f"{total.left:.2f}")
        table.add_row(escape(shown.population), *alone, *whole, *limit)
    kinds = {(s.task.delta, s.task.unit, s.task.adjacency) for s in found.totals}
    table.caption = "; ".join(f"ε at δ = {d:g}, unit {u}, {a}" for d, u, a in sorted(kinds))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
