"""What a backend of sites holds between its turns: how it calls, what is open, its Flower run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from clients.assignment import Assignment
from clients.orders import Order, Terms
from orchestrator.backends.sites_state import SitesState
from orchestrator.backends.superlink import (
    Arrived,
    Endpoint,
    Mishap,
    Node,
    Task,
    TaskLost,
    Wanted,
)

NodeOf: TypeAlias = Callable[[str], tuple[str, str | bytes] | str]
"""Says at which node a client is: its name and public key; else in a sentence why at none."""

Learn: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""Told of what a node says of itself in a reply."""

_LOG = logging.getLogger(__name__)


def nothing(node: str, about: Mapping[str, Any]) -> None:
    """Learn nothing."""


class Claimed(Protocol):
    """A Flower run that this process drives; :class:`orchestrator.backends.superlink.Claim`."""

    @property
    def task(self) -> Task:
        """What another process needs to go on."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the run is over."""
        ...

    def push(self, node: int, order: Order, deadline: float, group: str) -> str:
        """Send an order; return the message's id."""
        ...

    def replies(self, ids: Iterable[str]) -> list[Arrived]:
        """Return what has come in reply to messages."""
        ...

    def fetch(self, arrived: Arrived, most_bytes: int, wanted: Wanted) -> bytes | Mishap:
        """Return what a reply says."""
        ...

    def finish(self) -> None:
        """End the run."""
        ...

    def close(self) -> None:
        """Give no more signs of life."""
        ...


class Link(Protocol):
    """What sites are reached by; :class:`orchestrator.backends.superlink.SuperLink`."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it is."""
        ...

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that there are."""
        ...

    def claim(self) -> Claimed:
        """Begin a Flower run."""
        ...

    def attach(self, task: Task) -> Claimed:
        """Go on with one."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Calling:
    """How orders are sent.

    Attributes:
        terms: what they say besides the assignment; the deadline is set for each.
        patience_s: seconds until nobody waits for an answer, > 0.
        node_of: says at which node a client is.
        learn: told of what nodes say of themselves.
        away_s: seconds after which a node that is not there, or a SuperLink, has failed.
    """

    terms: Terms
    patience_s: float
    node_of: NodeOf
    learn: Learn = nothing
    away_s: float = 90.0


@dataclass(slots=True)
class Open:
    """What is asked and not answered.

    Attributes:
        assignment: of the client.
        node: name and public key of where it is.
        since: when it was asked; monotonic seconds.
        cut_off: when its node was found to be away last, or its answer lost; monotonic seconds.
        ids: messages in flight.
        activated: when its node had come online last, as the last one was sent, by the SuperLink's
            clock; 0 where none was.
        restored: whether they are another process' messages.
        sending: whether one is being sent.
    """

    assignment: Assignment
    node: tuple[str, bytes]
    since: float
    cut_off: float = 0.0
    ids: set[str] = field(default_factory=set)
    activated: float = 0.0
    restored: bool = False
    sending: bool = False

    @property
    def key(self) -> str:
        """What it is known by in another process: within a run nothing else is asked so."""
        a = self.assignment
        return f"{a.action} {a.client} {a.round} {a.base} {len(a.held or ())}"


@dataclass(slots=True)
class Line:
    """The Flower run that orders travel in; begun anew where it is lost.

    Attributes:
        superlink: whose.
        state: what of it is written down.
        claim: on it; None while there is none.
        gone: since when the SuperLink has not answered, monotonic seconds; None while it does.
        why: what it said last instead of taking part.
    """

    superlink: Link
    state: SitesState
    claim: Claimed | None = None
    gone: float | None = None
    why: str = ""

    def open(self) -> tuple[Claimed, bool]:
        """Return a claim, and whether it is the one that was written down."""
        if self.state.task is not None:
            try:
                return self.superlink.attach(self.state.task), True
            except TaskLost:
                _LOG.warning("the Flower run %s is over; a new one is begun", self.state.task.run)
        return self.superlink.claim(), False

    def answered(self) -> None:
        """Take note that the SuperLink is there."""
        self.gone, self.why = None, ""

    def silent(self, error: Exception) -> None:
        """Take note that it is not."""
        if self.gone is None:
            self.gone = time.monotonic()
            _LOG.warning("%s", error)
        self.why = str(error)
