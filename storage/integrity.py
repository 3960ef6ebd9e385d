"""What can be wrong with the rows of a store: read, never changed.

Each check yields a sentence for each thing that is wrong. Together they see every row, every
reference from table to table, every edge of the lineage, every id and every log.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, func, or_, select, text

from storage.canonical import RecordCorrupt, read_json
from storage.contributions import contributors
from storage.gates import gate_digest
from storage.lineage import Parent, parents_of, version_id
from storage.projection import PROJECTED, project
from storage.records import Event
from storage.schema import (
    clients,
    contributions,
    events,
    gates,
    kept_updates,
    metadata,
    named_versions,
    nodes,
    parents,
    promotions,
    runs,
    versions,
)

_PAGE = 1_000
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a store.

    Attributes:
        kind: ``database``, ``reference``, ``version``, ``contribution``, ``update``, ``edge``,
            ``name``, ``alias``, ``gate``, ``node``, ``run``, ``blob-missing`` or ``blob-corrupt``.
        subject: what it is about, such as a version's id or a blob's digest.
        text: a sentence.
        repaired: what was done about it, or None.
    """

    kind: str
    subject: str
    text: str
    repaired: str | None = None


def row_problems(connection: Connection) -> Iterator[Problem]:
    """Yield what is wrong with the rows that ``connection`` sees.

    Args:
        connection: of :func:`storage.database.reading`, so that rows are of one moment.
    """
    yield from _damage(connection)
    yield from _dangling(connection)
    yield from _wrong_versions(connection)
    yield from _wrong_updates(connection)
    yield from _backward_edges(connection)
    yield from _gaps(connection, named_versions, ("name",), "name")
    yield from _gaps(connection, promotions, ("name", "alias"), "alias")
    yield from _foreign_aliases(connection)
    yield from _gaps(connection, gates, ("name",), "gate")
    yield from _wrong_evidence(connection)
    yield from _gaps(connection, nodes, ("name",), "node")
    yield from _wrong_nodes(connection)
    yield from _wrong_runs(connection)


def _damage(connection: Connection) -> Iterator[Problem]:
    """What SQLite itself finds; PostgreSQL has its own tools (``amcheck``)."""
    if connection.dialect.name == "sqlite":
        for finding in connection.scalars(text(f"PRAGMA integrity_check({_SHOWN})")):
            if finding != "ok":
                yield Problem("database", "sqlite", f"the file is damaged: {finding}")


def _dangling(connection: Connection) -> Iterator[Problem]:
    """Rows that refer to a row that is not there, for every reference of every table."""
    for table in metadata.sorted_tables:
        for key in sorted(table.foreign_keys, key=lambda key: key.parent.name):
            here, there = key.parent, key.column.table.alias("there")
            absent = (
                ~select(there.c[key.column.name]).where(there.c[key.column.name] == here).exists()
            )
            query = select(here).where(here.is_not(None), absent).distinct().limit(_SHOWN)
            for value in connection.scalars(query):
                yield Problem(
                    "reference",
                    f"{table.name}.{here.name}",
                    f"{table.name}.{here.name} names {value!r}, which {key.column.table.name} "
                    "does not have",
                )


def _wrong_versions(connection: Connection) -> Iterator[Problem]:
    """Versions whose row and parents do not hash to their id, or that a search would miss."""
    last = -1
    while True:
        page = select(versions).where(versions.c.number > last).order_by(versions.c.number)
        rows = connection.execute(page.limit(_PAGE)).all()
        if not rows:
            return
        came_from = parents_of(connection, [row.number for row in rows])
        listed: defaultdict[int, set[str]] = defaultdict(set)
        within = contributions.c.number.between(rows[0].number, rows[-1].number)
        query = select(contributions.c.number, contributions.c.client).where(within)
        for number, client in connection.execute(query):
            listed[number].add(client)
        for row in rows:
            if _id_of(row, came_from.get(row.number, [])) != row.id:
                yield Problem(
                    "version",
                    row.id,
                    f"version {row.id[:12]} does not hash to its id: its row or its parents were "
                    "changed outside weft",
                )
            elif wrong := contributors(json.loads(row.recipe)) ^ listed[row.number]:
                yield Problem(
                    "contribution",
                    row.id,
                    f"version {row.id[:12]} is listed under clients, or missing there, otherwise "
                    f"than its recipe says: {', '.join(sorted(wrong)[:_SHOWN])}",
                )
        last = rows[-1].number


def _wrong_updates(connection: Connection) -> Iterator[Problem]:
    """Kept updates that their version was not made of, by its recipe."""
    query = select(kept_updates).order_by(kept_updates.c.version)
    found = connection.execute(query.execution_options(yield_per=_PAGE))
    for version, rows in groupby(found, key=lambda row: row.version):
        recipe = connection.scalar(select(versions.c.recipe).where(versions.c.id == version))
        leaves = _leaves(recipe)
        for row in rows:
            if (row.client, row.digest) not in leaves or row.blob not in (None, row.digest):
                yield Problem(
                    "update",
                    row.digest,
                    f"run {row.run} keeps the update {row.digest[:12]} of {row.client}, of which "
                    f"version {version[:12]} was not made",
                )


def _leaves(recipe: str | None) -> set[tuple[str, str]]:
    """Return whose updates, with which digests, a recipe lists; none where it cannot be read."""
    try:
        return {(leaf["client"], leaf["digest"]) for leaf in json.loads(recipe or "")["updates"]}
    except (ValueError, TypeError, KeyError):
        return set()


def _id_of(row: Row[Any], came_from: list[Parent]) -> str | None:
    try:
        recipe = json.loads(row.recipe)
        return version_id(row.tensors, row.auxiliary, row.memory, came_from, recipe)
    except (ValueError, TypeError):
        return None


def _backward_edges(connection: Connection) -> Iterator[Problem]:
    """Edges to a version that was committed later: every cycle has one."""
    child, parent = versions.alias("child"), versions.alias("parent")
    query = (
        select(child.c.id, parent.c.id)
        .join_from(parents, child, child.c.number == parents.c.child)
        .join(parent, parent.c.number == parents.c.parent)
        .where(parents.c.parent >= parents.c.child)
        .limit(_SHOWN)
    )
    for one, other in connection.execute(query):
        yield Problem(
            "edge",
            one,
            f"version {one[:12]} has the parent {other[:12]}, which was committed after it: "
            "a version cannot come from what comes from it",
        )


def _gaps(
    connection: Connection, table: Table, keys: tuple[str, ...], kind: str
) -> Iterator[Problem]:
    """Numbers that are not 1, 2, ... without a gap."""
    columns = [table.c[key] for key in keys]
    count, first, last = func.count(), func.min(table.c.number), func.max(table.c.number)
    query = select(*columns, count, first, last).group_by(*columns)
    for *group, number, low, high in connection.execute(
        query.having(or_(first != 1, last != count))
    ):
        subject = "@".join(group)
        yield Problem(
            kind, subject, f"{kind} {subject} has {number} numbers between {low} and {high}: a gap"
        )


def _foreign_aliases(connection: Connection) -> Iterator[Problem]:
    """Aliases that point, or pointed, at a version which their name never had."""
    belongs: ColumnElement[bool] = (
        select(named_versions.c.number)
        .where(
            and_(
                named_versions.c.name == promotions.c.name,
                named_versions.c.version == promotions.c.version,
            )
        )
        .exists()
    )
    query = select(promotions.c.name, promotions.c.alias, promotions.c.version).where(~belongs)
    for name, alias, version in connection.execute(query.limit(_SHOWN)):
        subject = f"{name}@{alias}"
        yield Problem("alias", subject, f"{subject} points at {version[:12]}, no version of {name}")


def _wrong_evidence(connection: Connection) -> Iterator[Problem]:
    """Moves whose evidence is of another version, or by a gate that the name never had."""
    known: dict[tuple[str, int], str] = {}
    for row in connection.execute(select(gates.c.name, gates.c.number, gates.c.document)):
        try:
            document = None if row.document is None else read_json(row.document, "a gate")
            known[row.name, row.number] = gate_digest(document)
        except RecordCorrupt:
            subject = f"{row.name} {row.number}"
            yield Problem("gate", subject, f"gate {row.number} of {row.name} cannot be read")
    query = select(promotions).where(promotions.c.evidence.is_not(None))
    for move in connection.execute(query):
        try:
            found = read_json(move.evidence, "evidence")
            gate = found["gate"]
            told = gate and known.get((move.name, gate["number"])) != gate["digest"]
            if found["version"] == move.version and not told:
                continue
        except (RecordCorrupt, LookupError, TypeError):
            pass
        subject = f"{move.name}@{move.alias}"
        yield Problem(
            "gate",
            subject,
            f"move {move.number} of {subject} has evidence that cannot be read, or is not of its "
            "version and a gate of its name",
        )


def _wrong_nodes(connection: Connection) -> Iterator[Problem]:
    """Nodes that cannot be read, or with a key of another fingerprint; clients without theirs."""
    for row in connection.execute(select(nodes).order_by(nodes.c.name, nodes.c.number)):
        subject = f"{row.name} {row.number}"
        try:
            for column in ("labels", "budgets", "document"):
                read_json(getattr(row, column), f"node {subject}")
            digest = hashlib.sha256(base64.b64decode(row.public_key.split(" ")[1])).digest()
        except (RecordCorrupt, LookupError, ValueError):
            yield Problem("node", subject, f"what was said of node {subject} cannot be read")
            continue
        if row.fingerprint != "SHA256:" + base64.b64encode(digest).decode().rstrip("="):
            yield Problem("node", subject, f"node {subject} has a key of another fingerprint")
    known = select(nodes.c.name)
    lost = clients.c.node.is_not(None) & clients.c.node.not_in(known)
    for name, node in connection.execute(select(clients.c.name, clients.c.node).where(lost)):
        yield Problem("node", name, f"client {name} is of node {node}, of which nothing is known")


def _wrong_runs(connection: Connection) -> Iterator[Problem]:
    """Runs whose log has gaps, or says that they stand elsewhere than their row does."""
    names = (runs.c.number, runs.c.id, runs.c.seq, *(runs.c[name] for name in PROJECTED))
    query = select(*names).order_by(runs.c.number).execution_options(yield_per=_PAGE)
    for row in connection.execute(query):
        try:
            log = _log(connection, row.id)
            told = {name: _plain(value) for name, value in project(log).items()}
            stands = {name: _plain(getattr(row, name)) for name in PROJECTED}
            stands["labels"] = json.loads(row.labels)
        except (ValueError, TypeError):
            yield Problem("run", row.id, f"run {row.id}, or its log, cannot be read")
            continue
        if [event.seq for event in log] != list(range(1, row.seq + 1)):
            yield Problem("run", row.id, f"the log of run {row.id} has gaps, or ends too early")
            continue
        wrong = sorted(name for name in PROJECTED if stands[name] != told[name])
        if wrong:
            yield Problem(
                "run",
                row.id,
                f"run {row.id} has {wrong[0]} = {stands[wrong[0]]!r}, and its log says "
                f"{told[wrong[0]]!r}",
            )


def _log(connection: Connection, run: str) -> list[Event]:
    names = (events.c.seq, events.c.kind, events.c.created_at, events.c.changes)
    query = select(*names).where(events.c.run == run).order_by(events.c.seq)
    return [
        Event(row.seq, row.kind, {}, row.created_at, json.loads(row.changes))
        for row in connection.execute(query)
    ]


def _plain(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value
