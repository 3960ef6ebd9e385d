"""Which phase of a round has ended, and how long it took: told from the order of events alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PHASES = ("plan", "reserve", "train", "aggregate", "commit", "evaluate")

_ENDS = {
    "round": "plan",
    "assigned": "reserve",
    "closed": "train",
    "aggregated": "aggregate",
    "committed": "commit",
    "evaluated": "evaluate",
    "evaluation failed": "evaluate",
}
_RESULTS = frozenset({"accepted", "refused", "late"})
_BEGINNINGS = frozenset({"run", "started"})
_TRAINING = _BEGINNINGS | {"assigned"}  # after these, results are those of the round's training


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase that has ended.

    Attributes:
        name: one of :data:`PHASES`.
        round: in which round, or 0 where no event has named one.
        began: when, in seconds of the clock.
        ended: when.
    """

    name: str
    round: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Phases:
    """Follows the events of a run.

    Training ends with the event ``closed``, or, in a run that writes none, with the last result
    before the aggregation.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._round = 0
        self._mark: float | None = None
        self._result: float | None = None
        self._training = False

    def after(self, kind: str, data: Mapping[str, Any]) -> tuple[Phase, ...]:
        """Return the phases that end with this event: none, one or two."""
        now = self._clock()
        self._round = int(data.get("round") or self._round)
        if kind in _RESULTS and self._training:
            self._result = now
        if kind in _BEGINNINGS:
            self._mark, self._result, self._training = now, None, True
        if kind not in _ENDS:
            return ()
        began = now if self._mark is None else self._mark
        found = []
        if kind == "aggregated" and self._result is not None:  # no event has closed the training
            found.append(Phase("train", self._round, began, self._result))
            began = self._result
        found.append(Phase(_ENDS[kind], self._round, began, now))
        self._mark, self._result, self._training = now, None, kind in _TRAINING
        return tuple(found)
