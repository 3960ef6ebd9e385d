"""When a run ends early, and which of its versions is the best: pure functions of its scores."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.history import Score
from orchestrator.policy import Stop


def exhausted(scores: Sequence[Score], stop: Stop) -> bool:
    """Return whether the last ``patience`` scores were no better than the best before them.

    Better is by more than ``min_delta``. A score without the metric, such as an infinite loss, is
    none.
    """
    top, waited = None, 0
    for score in scores:
        value = _value(score, stop)
        if value is not None and (top is None or value > top + stop.min_delta):
            top, waited = value, 0
        else:
            waited += 1
    return waited >= stop.patience


def best(scores: Sequence[Score], stop: Stop) -> Score | None:
    """Return the best score, the earliest of several; None if none has the metric."""
    top: tuple[float, Score] | None = None
    for score in scores:
        value = _value(score, stop)
        if value is not None and (top is None or value > top[0]):
            top = value, score
    return None if top is None else top[1]


def _value(score: Score, stop: Stop) -> float | None:
    """Return the metric, turned so that more is better."""
    value = score.metrics.get(stop.metric)
    return None if value is None else value if stop.highest else -value
