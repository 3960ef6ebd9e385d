"""The Backend protocol: assignments in, results and failures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from strategies.base import Update


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that failed, was late or was refused: a value, not an exception.

    Attributes:
        client: who.
        round: in which round.
        reason: one sentence; never contains data.
    """

    client: str
    round: int
    reason: str


Result: TypeAlias = Update | Evaluation | Failure
Started: TypeAlias = Callable[[Assignment], None]


class Backend(Protocol):
    """Runs assignments and yields each one's result as it completes."""

    def run(
        self, assignments: Iterable[Assignment], deadline: float, started: Started
    ) -> Iterator[Result]:
        """Yield exactly one result per assignment, in order of completion.

        Args:
            assignments: what to do; those that share tensors by identity are shipped once.
            deadline: seconds until those still running become a Failure, > 0.
            started: called when a worker begins with an assignment.
        """
        ...

    def close(self) -> None:
        """Give workers back."""
        ...


def failure(assignment: Assignment, error: BaseException) -> Failure:
    """Return the Failure that an exception at a client amounts to.

    Only messages of expected errors (ours, and the standard library's of the same kinds) leave the
    client. Of any other exception only the type does: its text might hold data.
    """
    own = type(error).__module__.split(".")[0] in ("clients", "strategies")
    text = f"{error}" if own else f"{type(error).__name__} at the client (its text stays there)"
    return Failure(assignment.client, assignment.round, " ".join(text.split()))
