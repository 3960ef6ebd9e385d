"""Sites' nodes: which are let in, with which keys, what they offer, and what is seen of them.

What people say of a node is a row, and the newest counts: a key that was trusted once is known for
ever, so that it is never trusted again by mistake. What a SuperLink sees of a node is kept apart.
What is in a join file is its reader's to know; here it is JSON.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias, get_args

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

from storage.canonical import canonical_json, read_json
from storage.database import insert_or_update, lock, writing
from storage.declared import newest_nodes
from storage.records import ClientRecord, now
from storage.refs import did_you_mean, quoted
from storage.registry import (
    REGISTERING,
    check_client,
    client_row,
    population_lock,
    refuse_taken,
)
from storage.schema import clients, node_sightings, nodes, populations

NodeStatus: TypeAlias = Literal["pending", "enabled", "disabled", "removed"]
"""Whether a node is let in: not yet, yes, not for now, never again under this key."""

NODE_STATUSES: tuple[NodeStatus, ...] = get_args(NodeStatus)

_JSON = ("labels", "budgets", "document")
_FEW = 50


class UnknownNode(LookupError):
    """No node is called this."""


class NodeChanged(RuntimeError):
    """Somebody else said something of a node in between."""


class KeyTaken(ValueError):
    """A key belongs to another node, or is trusted no more."""


class PopulationTaken(ValueError):
    """A population is somebody else's, or not what a data set was of before."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What was said of a node at one time.

    Attributes:
        name: unique.
        number: from 1, without gaps.
        status: whether it is let in.
        public_key: its key, in OpenSSH's format.
        fingerprint: of the key.
        expires_at: until when the key is good, UTC.
        labels: the operator's, over the site's own.
        budgets: by population of its data, (epsilon, delta) that the site lets it spend; without
            those that it sets no bound.
        document: its newest join file, JSON.
        who: who said so.
        why: as they say; may be empty.
        created_at: when, UTC.
    """

    name: str
    number: int
    status: NodeStatus
    public_key: str
    fingerprint: str
    expires_at: datetime
    labels: Mapping[str, str]
    budgets: Mapping[str, tuple[float, float]]
    document: Mapping[str, Any]
    who: str
    why: str
    created_at: datetime = field(default_factory=now, compare=False)

    def is_let_in(self, moment: datetime) -> bool:
        """Return whether it is enabled, and its key good, at ``moment``."""
        return self.status == "enabled" and moment < self.expires_at


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a SuperLink sees of a node.

    Attributes:
        node: its name.
        fingerprint: of the key that it is known by there.
        flower_id: Flower's id of it there, or None while it has none.
        seen_at: when it was last online, UTC, or None if it never was.
        weft: version of its weft, as it last said.
        flwr: version of its Flower, as it last said.
        problem: why it cannot be let in there although it should, or None.
    """

    node: str
    fingerprint: str
    flower_id: str | None = None
    seen_at: datetime | None = None
    weft: str | None = None
    flwr: str | None = None
    problem: str | None = None


class Nodes:
    """The nodes that there are and were.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the ledger.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def put(self, record: NodeRecord, offered: Sequence[ClientRecord] | None = None) -> None:
        """Write what is said of a node now, and which clients it has, in one transaction.

        A population that is new gets the budget that the site declared; another one's is lowered to
        it. Where it was all that the site let it spend before, it is what the site lets it spend.

        Args:
            record: its ``number`` is one more than that of what it was decided by.
            offered: the node's clients from now on, each with the node's name; one with the same
                data as before is the same one, if it is called otherwise too. None leaves them as
                they are.

        Raises:
            NodeChanged: if something else was said of it since.
            KeyTaken: if its key was ever another node's, or was one of its own that is not now.
            ClientExists, BadClient, BadBudget: if a client cannot be registered.
            PopulationTaken: if a population is of others' data, or a data set of another one.
        """
        with writing(self._engine) as connection:
            lock(connection, REGISTERING)
            before = _newest(connection, record.name)
            if record.number != (before.number if before else 0) + 1:
                raise NodeChanged(
                    f"somebody else changed node {record.name!r} in between; look at it again: "
                    f"weft clients show {record.name}"
                )
            _refuse_key(connection, record, before)
            row = asdict(record)
            row |= {name: canonical_json(row[name], name) for name in _JSON}
            connection.execute(insert(nodes).values(row))
            if offered is not None:
                _offer(connection, record, before, offered)

    def find(self, name: str) -> NodeRecord | None:
        """Return what was last said of a node, or None if nothing ever was."""
        with self._engine.connect() as connection:
            return _newest(connection, name)

    def get(self, name: str) -> NodeRecord:
        """Return what was last said of a node.

        Raises:
            UnknownNode: if nothing ever was, with what was perhaps meant.
        """
        with self._engine.connect() as connection:
            found = _newest(connection, name)
            if found is None:
                known = connection.scalars(select(nodes.c.name).distinct()).all()
                raise UnknownNode(f"no node is called {quoted(name)}{did_you_mean(name, known)}")
        return found

    def all(self) -> list[NodeRecord]:
        """Return what was last said of every node, by name; also of those that are removed."""
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(newest_nodes())]

    def history(self, name: str) -> list[NodeRecord]:
        """Return what was ever said of a node, newest first."""
        query = select(nodes).where(nodes.c.name == name).order_by(nodes.c.number.desc())
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def keys(self) -> dict[str, str]:
        """Return every public key that was ever a node's, by the key: of which node."""
        query = select(nodes.c.public_key, nodes.c.name).distinct()
        with self._engine.connect() as connection:
            return {row.public_key: row.name for row in connection.execute(query)}

    def of_clients(self, names: Collection[str] | None = None) -> dict[str, NodeRecord]:
        """Return the node of each client that has one: of these, or of all."""
        query = select(clients.c.name, clients.c.node).where(clients.c.node.is_not(None))
        newest = newest_nodes()
        if names is not None and len(names) <= _FEW:  # more are found sooner among all
            query = query.where(clients.c.name.in_(names))
            newest = newest.where(nodes.c.name.in_(query.with_only_columns(clients.c.node)))
        with self._engine.connect() as connection:
            owners = {row.name: row.node for row in connection.execute(query)}
            known = {row.name: _record(row) for row in connection.execute(newest)}
        wanted = owners if names is None else owners.keys() & set(names)
        return {name: known[owners[name]] for name in wanted if owners[name] in known}

    def see(self, sightings: Iterable[Sighting]) -> None:
        """Write what is seen of nodes, whatever was seen before."""
        with writing(self._engine) as connection:
            insert_or_update(connection, node_sightings, [asdict(one) for one in sightings])

    def said_versions(self, node: str, weft: str, flwr: str) -> None:
        """Write which versions a node said that it has; nothing of one that was never seen."""
        changed = (node_sightings.c.weft != weft) | (node_sightings.c.flwr != flwr)
        unknown = node_sightings.c.weft.is_(None) | node_sightings.c.flwr.is_(None)
        own = update(node_sightings).where(node_sightings.c.node == node, changed | unknown)
        with writing(self._engine) as connection:
            connection.execute(own.values(weft=weft, flwr=flwr))

    def sightings(self) -> dict[str, Sighting]:
        """Return what is seen of each node, by its name."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(node_sightings))
            return {row.node: Sighting(**row._asdict()) for row in rows}


def _newest(connection: Connection, name: str) -> NodeRecord | None:
    row = connection.execute(newest_nodes().where(nodes.c.name == name)).first()
    return None if row is None else _record(row)


def _record(row: Row[Any]) -> NodeRecord:
    read = {name: read_json(getattr(row, name), f"node {row.name}") for name in _JSON}
    read["budgets"] = {name: tuple(both) for name, both in read["budgets"].items()}
    return NodeRecord(**row._asdict() | read)


def _refuse_key(connection: Connection, record: NodeRecord, before: NodeRecord | None) -> None:
    """Refuse a key of another node, and one that this node had before and does not have now."""
    if before and before.fingerprint == record.fingerprint and before.status != "removed":
        return
    same = select(nodes.c.name).where(nodes.c.fingerprint == record.fingerprint)
    owner = connection.scalar(same.order_by(nodes.c.name).limit(1))
    if owner is None or record.status == "removed":
        return
    whose = f"node {owner!r}" if owner != record.name else "this node, and is trusted no more"
    raise KeyTaken(
        f"the key {record.fingerprint} of node {record.name!r} was that of {whose}; the site can "
        "make another with: weft node rotate"
    )


def _offer(
    connection: Connection,
    record: NodeRecord,
    before: NodeRecord | None,
    offered: Sequence[ClientRecord],
) -> None:
    """Make ``offered`` the node's clients."""
    own = clients.c.node == record.name
    there = {row.data: row for row in connection.execute(select(clients).where(own))}
    gone = [row.name for data, row in there.items() if data not in {c.data for c in offered}]
    connection.execute(delete(clients).where(own, clients.c.name.in_(gone)))
    for population in sorted({one.population for one in offered}):
        _bound(connection, record, before, population)
    named = [one for one in offered if one.data not in there or there[one.data].name != one.name]
    refuse_taken(connection, [("", one) for one in named])
    new = []
    for one in offered:
        check_client(one)
        was = there.get(one.data)
        if was is None:
            new.append(one)
            continue
        if was.population != one.population:
            raise PopulationTaken(
                f"the data {one.data!r} of node {record.name!r} are of population "
                f"{was.population!r}, got {one.population!r}; what was spent stays there: keep it, "
                "or offer the data under another name"
            )
        kept = {k: v for k, v in client_row(one).items() if k != "created_at"}
        connection.execute(update(clients).where(clients.c.name == was.name).values(kept))
    if new:
        connection.execute(insert(clients), [client_row(one) for one in new])


def _bound(
    connection: Connection, record: NodeRecord, before: NodeRecord | None, population: str
) -> None:
    """Bring a population's budget within what the node's site lets it spend."""
    lock(connection, population_lock(population))
    others = select(clients.c.name).where(
        clients.c.population == population, clients.c.node.is_distinct_from(record.name)
    )
    taken = connection.scalar(others.limit(1))
    if taken is not None:
        raise PopulationTaken(
            f"population {population!r} is that of client {taken!r}, which is not of node "
            f"{record.name!r}; the site has to call its own otherwise in its node.yaml"
        )
    own = populations.c.name == population
    row = connection.execute(select(populations).where(own)).first()
    lets = record.budgets.get(population)
    if row is None:
        epsilon, delta = lets or (None, None)
        made = {"name": population, "epsilon": epsilon, "delta": delta, "created_at": now()}
        connection.execute(insert(populations).values(made))
        return
    has = None if row.epsilon is None else (row.epsilon, row.delta)
    let_before = before.budgets.get(population) if before else None
    if before is not None and has == let_before:
        has = lets  # it is the site's own
    elif lets is not None:
        has = lets if has is None else (min(has[0], lets[0]), min(has[1], lets[1]))
    epsilon, delta = has or (None, None)
    connection.execute(update(populations).where(own).values(epsilon=epsilon, delta=delta))
