"""Hands assignments to a backend as they come up, over one or many rounds, and results back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field

from clients.assignment import Assignment
from orchestrator.backends.base import Backend, Failure, Result, Started, Stepped


@dataclass(slots=True)
class Desk:
    """One stream of assignments to a backend and of results from it.

    It stays open from round to round, so that who is late can go on; giving up closes it, and the
    next assignment opens another.

    Attributes:
        backend: where assignments run.
        started: called when a worker begins with one.
        stepped: called now and then with how far one is.
        heed: called while :meth:`one` waits; raises where people want the run to stop.
    """

    backend: Backend
    started: Started
    stepped: Stepped = lambda assignment, step, steps: None
    heed: Callable[[], None] = lambda: None
    _queue: deque[Assignment] = field(default_factory=deque, init=False)
    _held: deque[Result] = field(default_factory=deque, init=False)
    _results: Generator[Result | None] | None = field(default=None, init=False)

    def ask(self, assignments: Iterable[Assignment]) -> None:
        """Queue assignments; workers take them when they are free."""
        self._queue.extend(assignments)

    def next(self) -> Result | None:
        """Return the next result; None, a tick, if none came for a moment."""
        return self._held.popleft() if self._held else next(self._open())

    def one(self, assignment: Assignment, timeout: float) -> Result:
        """Return the result of one assignment, which goes before all others.

        What else comes meanwhile is kept for :meth:`next`.

        Args:
            assignment: of nobody else that is asked now.
            timeout: seconds until it is a Failure.
        """
        until = time.monotonic() + timeout
        self._queue.appendleft(assignment)
        while time.monotonic() <= until:
            self.heed()
            result = next(self._open())
            if result is not None and result.client == assignment.client:
                return result
            if result is not None:
                self._held.append(result)
        self._queue = deque(a for a in self._queue if a is not assignment)
        return Failure(assignment.client, assignment.round, "missed the round's deadline")

    def give_up(self) -> None:
        """Forget what is queued and end what still runs."""
        if self._results is not None:
            self._results.close()
            self._results = None
        self._queue.clear()
        self._held.clear()

    def _open(self) -> Generator[Result | None]:
        if self._results is None:
            self._results = self.backend.run(self._feed(), self.started, self.stepped)
        return self._results

    def _feed(self) -> Iterator[Assignment | None]:
        while True:
            yield self._queue.popleft() if self._queue else None
