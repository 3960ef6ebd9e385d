"""The Backend protocol: assignments in, results and failures out.

Time is the caller's: a backend knows no deadline. It says at least every :data:`TICK_S` that it is
still there, and gives up what runs when its iterator is closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from clients import pace
from clients.assignment import Assignment
from clients.downlink import NotHeld
from clients.evaluate import Evaluation
from clients.reasons import reason_of
from strategies.base import Update


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that failed, was late or was refused: a value, not an exception.

    Attributes:
        client: who.
        round: in which round.
        reason: one sentence; never contains data.
        not_held: whether all that failed is that the client does not hold what it was not sent.
        final: whether it would fail again, so that nobody asks it again in this round.
    """

    client: str
    round: int
    reason: str
    not_held: bool = False
    final: bool = False


Result: TypeAlias = Update | Evaluation | Failure
Started: TypeAlias = Callable[[Assignment], None]
Stepped: TypeAlias = Callable[[Assignment, int, int], None]
"""Told of an assignment's steps done, and its steps in all (0: not known yet)."""

Perform: TypeAlias = Callable[[Assignment, pace.Stepped], Update | Evaluation]
"""What is done with an assignment where it runs, such as :func:`clients.worker.perform`."""

TICK_S = 0.2


def unheard(assignment: Assignment, step: int, steps: int) -> None:
    """Let progress pass."""


class Backend(Protocol):
    """Runs assignments and yields each one's result as it completes."""

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield exactly one result per assignment, in order of completion.

        Closing the generator gives up what still runs; the backend can be used again afterwards.

        Args:
            assignments: what to do, taken one at a time when a worker is free. Those that share
                tensors by identity are shipped once. A None among them says that there is nothing
                to do now: more is asked for after the next yield.
            started: called when a worker begins with an assignment; again if it has to be begun
                anew elsewhere.
            stepped: called now and then with how far an assignment is.

        Yields:
            A result; or None, a tick, when :data:`TICK_S` have passed without one.
        """
        ...

    def close(self) -> None:
        """Give workers back."""
        ...


def complete(
    backend: Backend,
    assignments: Sequence[Assignment],
    deadline: float,
    started: Started,
    stepped: Stepped = unheard,
) -> Iterator[Result]:
    """Yield exactly one result per assignment; what is not done in time is a Failure.

    Args:
        backend: where to run.
        assignments: of different clients.
        deadline: seconds until those still running are given up.
        started: as in :meth:`Backend.run`.
        stepped: as in :meth:`Backend.run`.
    """
    end = time.monotonic() + deadline
    open_ = {a.client: a for a in assignments}
    with closing(backend.run(assignments, started, stepped)) as results:
        while open_ and time.monotonic() <= end:
            result = next(results)
            # of a client that answers twice, the first answer counts
            if result is not None and result.client in open_:
                del open_[result.client]
                yield result
    for late in open_.values():
        yield Failure(late.client, late.round, "missed the round's deadline")


def failure(assignment: Assignment, error: BaseException) -> Failure:
    """Return the Failure that an exception at a client amounts to; it never contains data."""
    reason = reason_of(assignment, error)
    return Failure(assignment.client, assignment.round, reason, isinstance(error, NotHeld))
