"""Hands assignments to a backend as they come up, over one or many rounds, and results back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from clients.assignment import Assignment
from clients.evaluate import Evaluation
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
        heed: called while :meth:`several` waits; raises where people want the run to stop.
        clock: returns seconds.
    """

    backend: Backend
    started: Started
    stepped: Stepped = lambda assignment, step, steps: None
    heed: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    _queue: deque[Assignment] = field(default_factory=deque, init=False)
    _held: deque[Result] = field(default_factory=deque, init=False)
    _given_up: list[Assignment] = field(default_factory=list, init=False)
    _results: Generator[Result | None] | None = field(default=None, init=False)

    def ask(self, assignments: Iterable[Assignment]) -> None:
        """Queue assignments; workers take them when they are free."""
        self._queue.extend(assignments)

    def next(self) -> Result | None:
        """Return the next result; None, a tick, if none came for a moment."""
        return self._held.popleft() if self._held else self._take()

    def one(
        self,
        assignment: Assignment,
        timeout: float,
        retries: int = 0,
        retried: Callable[[Failure], None] = lambda failure: None,
    ) -> Result:
        """Return the result of one assignment that is no client's; see :meth:`several`."""
        return self.several([assignment], timeout, retries, retried)[0]

    def several(
        self,
        assignments: Sequence[Assignment],
        timeout: float,
        retries: int = 0,
        retried: Callable[[Failure], None] = lambda failure: None,
    ) -> list[Result]:
        """Return the results of some assignments, in their order; they go before all others.

        What else comes meanwhile is kept for :meth:`next`. Once one was given up, its answer is
        nobody's: the next assignment waits for its own.

        Args:
            assignments: of different clients, whose results are told from what else they may be
                asked by client, round and kind.
            timeout: seconds until one is a Failure, tries together.
            retries: how often each is tried again when it fails, >= 0.
            retried: told of each failure after which it is.
        """
        until = self.clock() + timeout
        open_ = {one.client: one for one in assignments}
        tries = dict.fromkeys(open_, retries)
        found: dict[str, Result] = {}
        self._queue.extendleft(reversed(assignments))
        while open_ and self.clock() <= until:
            self.heed()
            result = self._take()
            if result is None:
                continue
            asked = open_.get(result.client)
            if asked is None or not _answers(result, asked):
                self._held.append(result)
            elif isinstance(result, Failure) and tries[result.client]:
                tries[result.client] -= 1
                retried(result)
                self._queue.appendleft(asked)
            else:
                found[result.client] = result
                del open_[result.client]
        for late in open_.values():
            waiting = len(self._queue)
            self._queue = deque(a for a in self._queue if a is not late)
            if len(self._queue) == waiting:  # it was begun
                self._given_up.append(late)
            found[late.client] = Failure(late.client, late.round, "missed the round's deadline")
        return [found[one.client] for one in assignments]

    def give_up(self) -> None:
        """Forget what is queued and end what still runs."""
        if self._results is not None:
            self._results.close()
            self._results = None
        self._queue.clear()
        self._held.clear()
        self._given_up.clear()

    def _take(self) -> Result | None:
        """Return the next result that somebody waits for, or None."""
        result = next(self._open())
        for assignment in self._given_up:
            if result is not None and _answers(result, assignment):
                self._given_up.remove(assignment)
                return None
        return result

    def _open(self) -> Generator[Result | None]:
        if self._results is None:
            self._results = self.backend.run(self._feed(), self.started, self.stepped)
        return self._results

    def _feed(self) -> Iterator[Assignment | None]:
        while True:
            yield self._queue.popleft() if self._queue else None


def _answers(result: Result, assignment: Assignment) -> bool:
    """Return whether a result is this assignment's: of its client, round and kind."""
    if (result.client, result.round) != (assignment.client, assignment.round):
        return False
    scored = isinstance(result, Evaluation)
    return isinstance(result, Failure) or scored == (assignment.action == "evaluate")
