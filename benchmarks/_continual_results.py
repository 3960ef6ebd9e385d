"""What the streams of ``continual.py`` found, kept as a small file beside them, and what follows.

A stream's scores are those that ``weft stream show`` prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _continual_plan import Choice, Method
from _quality_results import Summary, summary

from clients.files import write_durably
from orchestrator.stream_report import StreamReport
from orchestrator.streaming import Step
from orchestrator.workspace import Workspace

AWARE, FREE, ROUTED = "task-aware", "task-free", "routed"
_SCORES = ("average", "backward_transfer", "forgetting", "learning_accuracy")


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one stream.

    Attributes:
        scores: by what the model is told, then by measure; without those that there are none of.
        sent: bytes that a client sends in a round of the last task; what it sends once, when a
            memory is made from its data, is not in it.
        adapter: numbers of the adapters that are kept for all tasks together, without the head.
        memory: numbers that are kept besides, for the tasks to come.
        general: perplexity on text of no task, before the first and after the last task.
        cpu_s: processor time, all processes that worked on it together.
        failed: why it got no further; empty for one that is done.
    """

    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sent: int = 0
    adapter: int = 0
    memory: int = 0
    general: tuple[float, ...] = ()
    cpu_s: float = 0.0
    failed: str = ""

    @property
    def done(self) -> bool:
        """Whether all its tasks were learned and measured."""
        return bool(self.scores)


def load(path: Path) -> Found | None:
    """Return what is known of a stream; None of nothing."""
    if not path.exists():
        return None
    return _found(json.loads(path.read_text("utf-8")))


def load_all(path: Path | None) -> dict[str, Found]:
    """Return what a file of many streams holds, by their names; one that is not there, nothing."""
    if path is None or not path.exists():
        return {}
    kept = json.loads(path.read_text("utf-8"))
    return {name: _found(one) for name, one in kept.items()}


def _found(kept: Mapping[str, Any]) -> Found:
    return Found(**{**kept, "general": tuple(kept["general"])})


def keep_all(path: Path, found: Mapping[str, Found]) -> None:
    """Write down what is known of many streams, a line each; the file is replaced."""
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(found[name]))}" for name in sorted(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def keep(path: Path, found: Found) -> None:
    """Write down what is known of a stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found)), "utf-8")


def found_in(workspace: Workspace, told: StreamReport, cpu_s: float) -> Found:
    """Return what came of a stream that is done."""
    scores = {
        how: {k: v for k in _SCORES if (v := matrix.to_json()[k]) is not None}
        for how, (matrix, _) in told.matrices.items()
    }
    scores.setdefault(AWARE, scores[FREE])
    apart = told.stream.start in ("fresh", "isolated")
    versions = [str(step.result) for step in (told.steps if apart else told.steps[-1:])]
    store = workspace.store
    carried = [str(told.steps[-1].version)]
    known = [value for value in told.general if value is not None]
    return Found(
        scores,
        _sent(workspace, told.steps[-1]),
        sum(_numbers(store.tensors(version)) for version in versions),
        sum(_numbers(store.memory(v)) + _numbers(store.auxiliary(v)) for v in carried),
        tuple(known[:1] + known[-1:]),
        cpu_s,
    )


def _numbers(tensors: Mapping[str, Any]) -> int:
    return sum(t.numel() for name, t in tensors.items() if not name.startswith("head."))


def _sent(workspace: Workspace, step: Step) -> int:
    assert step.record is not None
    events = workspace.ledger.events(step.record.id, kinds={"accepted"})
    return min((event.data["bytes"] for event in events), default=0)


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a method's learning rate was chosen.

    Attributes:
        method: the method.
        scores: by choice, the mean of the averages with and without the task told, on held-back
            rows; None where the stream failed.
        missing: choices whose streams have not ended.
    """

    method: Method
    scores: Mapping[Choice, float | None]
    missing: tuple[Choice, ...] = ()

    @property
    def choice(self) -> Choice | None:
        """The choice with the best score, the first of equals; None before all have ended."""
        scored = [(-score, n) for n, score in enumerate(self.scores.values()) if score is not None]
        return None if self.missing or not scored else tuple(self.scores)[min(scored)[1]]

    @property
    def at_an_edge(self) -> bool:
        """Whether the best rate, where only rates were tried, is the lowest or highest of them."""
        rates = self.method.rates
        edges = (min(rates), max(rates))
        return self.choice is not None and not self.method.weights and self.choice[0] in edges


def tuning_score(found: Found) -> float | None:
    """Return what rates are judged by; None of a stream that failed."""
    if not found.done:
        return None
    return (found.scores[AWARE]["average"] + found.scores[FREE]["average"]) / 2


def over_seeds(found: Iterable[Found], measure: Callable[[Found], float | None]) -> Summary | None:
    """Return a measure over the streams that are done and have it."""
    values = [measure(one) for one in found if one.done]
    return summary([value for value in values if value is not None])
