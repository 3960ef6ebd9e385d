"""One process, one client at a time: the reference that the other backends must equal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from clients.assignment import Assignment
from clients.worker import perform
from orchestrator.backends.base import Failure, Result, Started, failure


class InlineBackend:
    """Runs assignments here, in order."""

    def run(
        self, assignments: Iterable[Assignment], deadline: float, started: Started
    ) -> Iterator[Result]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`."""
        end = time.monotonic() + deadline
        for assignment in assignments:
            if time.monotonic() > end:
                yield Failure(assignment.client, assignment.round, "missed the round's deadline")
                continue
            started(assignment)
            try:
                yield perform(assignment)
            except Exception as error:  # a client's failure is a value
                yield failure(assignment, error)

    def close(self) -> None:
        """Nothing to give back."""
