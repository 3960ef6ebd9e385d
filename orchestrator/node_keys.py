"""A SuperLink lets in the nodes that the ledger lets in, and no others: kept so every few seconds.

Whoever is disabled, removed or expired, or has a newer key, is shut out the next time round. What
the SuperLink sees of nodes goes on the ledger: others have no access to it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from clients.node.identity import PublicKey
from storage.ledger import Ledger
from storage.nodes import NodeRecord, Sighting
from storage.records import now

ONLINE_FOR = timedelta(seconds=45)
"""A node that was seen so lately is online."""

_FRESH = timedelta(seconds=10)  # what is seen again within it is not written again
_LOG = logging.getLogger(__name__)


class SeenNode(Protocol):
    """A node that a SuperLink knows."""

    @property
    def id(self) -> int:
        """Its number there."""
        ...

    @property
    def public_key(self) -> bytes:
        """Its key, PEM."""
        ...

    @property
    def online(self) -> bool:
        """Whether it gave a sign of life lately."""
        ...

    @property
    def last_seen(self) -> float:
        """Unix seconds of its last sign of life; 0 for never."""
        ...


class SuperLink(Protocol):
    """As much of a SuperLink as its keys need; errors that are the connection's go through."""

    def nodes(self) -> Sequence[SeenNode]:
        """Return the nodes that are registered."""
        ...

    def register(self, public_key: str | bytes, name: str) -> int:
        """Let a key in; return the node's number. Raises ValueError or RuntimeError if it cannot.

        The error's text says why.
        """
        ...

    def unregister(self, node: int) -> None:
        """Shut a node out, by its number. Raises RuntimeError if there is none such."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What bringing a SuperLink into step took.

    Attributes:
        registered: names of the nodes that it lets in from now on.
        unregistered: names of the nodes that it lets in no more, by one of their keys.
        problems: by node: why it cannot be let in.
        strangers: how many nodes are registered there of which the ledger knows nothing.
    """

    registered: tuple[str, ...] = ()
    unregistered: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    strangers: int = 0


def keys_in_step(superlink: SuperLink, ledger: Ledger) -> Step:
    """Make a SuperLink let in exactly the nodes that the ledger does; write down what it sees.

    Keys that the ledger never knew are left alone. Idempotent, and quick where nothing changed.
    """
    moment = now()
    owners = {PublicKey(text).pem: name for text, name in ledger.nodes.keys().items()}
    wanted = {PublicKey(r.public_key).pem: r for r in ledger.nodes.all() if r.is_let_in(moment)}
    there: dict[bytes, SeenNode] = {}
    unregistered, strangers = [], 0
    for node in superlink.nodes():
        if node.public_key in wanted:
            there[node.public_key] = node
        elif node.public_key in owners:
            with suppress(RuntimeError):  # another process did it just now
                superlink.unregister(node.id)
            unregistered.append(owners[node.public_key])
        else:
            strangers += 1
    registered, problems = [], []
    seen = ledger.nodes.sightings()
    news = []
    for key, record in wanted.items():
        before = _before(seen.get(record.name), record)
        found = there.get(key)
        if found is None:
            sighting = _registered(superlink, key, record, before)
            if sighting.problem is None:
                registered.append(record.name)
            else:
                problems.append((record.name, sighting.problem))
        else:
            sighting = _seen(found, before, moment)
        if sighting != before or record.name not in seen:
            news.append(sighting)
    shut = [
        seen[name] for name in set(unregistered) - {r.name for r in wanted.values()} & set(seen)
    ]
    news += [replace(one, flower_id=None) for one in shut if one.flower_id is not None]
    if news:
        ledger.nodes.see(news)
    for name in unregistered:
        _LOG.warning("node %s is let in no more: its key was taken off the SuperLink", name)
    return Step(tuple(registered), tuple(unregistered), tuple(problems), strangers)


def is_online(sighting: Sighting | None, moment: datetime) -> bool:
    """Return whether a node was seen so lately that it is there."""
    seen = sighting.seen_at if sighting else None
    return seen is not None and moment - seen <= ONLINE_FOR


def _before(known: Sighting | None, record: NodeRecord) -> Sighting:
    """Return what was seen of a node under the key that it has; with what its join file says."""
    if known is not None and known.fingerprint == record.fingerprint:
        return known
    said = record.document["statement"]
    seen = known.seen_at if known else None
    return Sighting(record.name, record.fingerprint, None, seen, said["weft"], said["flwr"])


def _registered(superlink: SuperLink, key: bytes, record: NodeRecord, before: Sighting) -> Sighting:
    try:
        number = superlink.register(key, record.name)
    except (ValueError, RuntimeError) as error:
        if before.problem != str(error):
            _LOG.warning("node %s cannot be let in: %s", record.name, error)
        return replace(before, flower_id=None, problem=str(error))
    _LOG.info("node %s is let in, as %s", record.name, number)
    return replace(before, flower_id=str(number), problem=None)


def _seen(found: SeenNode, before: Sighting, moment: datetime) -> Sighting:
    at = before.seen_at
    if found.online:
        at = moment if at is None or moment - at >= _FRESH else at
    elif found.last_seen > 0:
        at = datetime.fromtimestamp(found.last_seen, UTC)
    return replace(before, flower_id=str(found.id), seen_at=at, problem=None)
