"""One run at sites and here: each client where its data are, what is nobody's here.

Two backends share one stream of assignments. Sites are served first, since they work while this
process does; a local backend that works in this process keeps what comes from them waiting, for
as long as one assignment takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from clients.assignment import NO_DATA, Assignment
from clients.data import is_elsewhere
from orchestrator.backends.base import Backend, Result, Started, Stepped, unheard


@dataclass(slots=True)
class _Sorting:
    """Assignments as they come, one queue for each backend."""

    coming: Iterator[Assignment | None]
    sites: deque[Assignment] = field(default_factory=deque)
    local: deque[Assignment] = field(default_factory=deque)
    more: bool = True

    def queue(self, of: deque[Assignment]) -> Iterator[Assignment | None]:
        """Yield what one of the backends is to do; None where there is nothing now."""
        while True:
            if not of:
                self._take(of)
            if of:
                yield of.popleft()
            elif self.more:
                yield None
            else:
                return

    def _take(self, wanted: deque[Assignment]) -> None:
        """Take what comes, until there is something for a queue or nothing now."""
        while not wanted:
            assignment = next(self.coming, ...)
            if assignment is ... or assignment is None:
                self.more = assignment is None
                return
            away = assignment.data != NO_DATA and is_elsewhere(assignment.data.uri)
            (self.sites if away else self.local).append(assignment)


@dataclass(frozen=True, slots=True)
class MixedBackend:
    """Runs assignments whose data lie at sites there, and all others here.

    Args:
        local: runs what needs no site: clients whose data are here, first tensors, scores.
        sites: runs the rest.
    """

    local: Backend
    sites: Backend

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`."""
        sorting = _Sorting(iter(assignments))
        with (
            closing(self.sites.run(sorting.queue(sorting.sites), started, stepped)) as sites,
            closing(self.local.run(sorting.queue(sorting.local), started, stepped)) as local,
        ):
            working = [sites, local]
            while working:
                found = [self._next(results, working) for results in tuple(working)]
                done = [result for result in found if result is not None]
                yield from done
                if working and not done:
                    yield None

    def _next(
        self, results: Generator[Result | None], working: list[Generator[Result | None]]
    ) -> Result | None:
        """Return a backend's next result; one that has no more works no more."""
        try:
            return next(results)
        except StopIteration:
            working.remove(results)
            return None

    def close(self) -> None:
        """Give workers back and end what sites were asked for."""
        try:
            self.sites.close()
        finally:
            self.local.close()
