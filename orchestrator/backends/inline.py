"""One process, one client at a time: the reference that the other backends must equal."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

from clients.assignment import Assignment
from clients.worker import perform
from orchestrator.backends.base import Perform, Result, Started, Stepped, failure, unheard


@dataclass(frozen=True, slots=True)
class InlineBackend:
    """Runs assignments here, in order.

    Args:
        perform: what is done with an assignment.
    """

    perform: Perform = perform

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`."""
        for assignment in assignments:
            if assignment is None:
                yield None
                continue
            started(assignment)
            try:
                yield self.perform(assignment, partial(stepped, assignment))
            except Exception as error:  # a client's failure is a value
                yield failure(assignment, error)

    def close(self) -> None:
        """Nothing to give back."""
