"""Bringing a backup back: rows and blobs together, in one transaction.

What is content (versions, their edges, metrics and signatures) and what must never be forgotten
(populations and which of them share records, privacy spends, runs without privacy, withdrawals,
yanks, sites' nodes) is united with what the store has: a spend that either of them counts is
counted, a client that withdrew from either does not come back, and the newest word on whether a
version is yanked, or a node let in, counts, whichever of them has it. What people have decided
since (names, aliases, runs, clients) becomes what it was in the backup, and only if the store holds
none of it that the backup lacks, or it is asked for. So an alias may point at a version that was
yanked since: then it says so, and nobody moves it there again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, delete, func, insert, select, update

from storage.backup import Backup, BadBackup, Progress, pages, read_backup, tables_of
from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from storage.contributions import record_contributions
from storage.database import connect, insert_missing, lock, migrate, reading, writing
from storage.declared import newest_nodes
from storage.places import Folder
from storage.references import claim, references
from storage.runs import append
from storage.schema import (
    clients,
    kept_updates,
    metadata,
    nodes,
    parents,
    runs,
    spends,
    versions,
    withdrawals,
)

UNITED = (
    "versions",
    "version_parents",
    "metrics",
    "nodes",
    "signatures",
    "populations",
    "related_populations",
    "spends",
    "unprotected_runs",
    "withdrawals",
    "yanks",
)
"""Tables of which nothing is ever forgotten."""

BY_TIME = {"nodes": "name", "yanks": "version"}
"""Tables whose newest row of a key counts, with the key."""

SKIPPED = ("condemned_blobs", "contributions", "followers", "node_sightings", *BY_TIME)
"""What says nothing about another place's blobs, servers or SuperLink, what recipes say, what is
united by time."""

_OF_A_SPEND = ("population", "client", "run", "round", "mechanism", "unit", "adjacency")


class StoreNotEmpty(ValueError):
    """The store holds what the backup does not, and would lose it."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a backup brought back.

    Attributes:
        backup: what it holds.
        missing: digests that its rows name, and that neither it nor the store has.
        paused: ids of the runs that were going on in the backup, which are paused now.
        num_spends: how many privacy events the store counts now, of all populations.
    """

    backup: Backup
    missing: tuple[str, ...]
    paused: tuple[str, ...]
    num_spends: int


def restore(
    engine: Engine,
    blobs: BlobStore,
    folder: Path,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> Restored:
    """Bring a backup back into a store.

    Whatever happens on the way, the store has either all of the rows or none of them.

    Args:
        engine: the store's database.
        blobs: its blobs.
        folder: the backup, of this schema or an older one.
        replace: whether names, aliases, runs and clients that the backup lacks may be lost.
        progress: told how far the copying of blobs is.

    Raises:
        BadBackup: if the folder is no backup, was changed, or contradicts the store.
        StoreNotEmpty: if something would be lost without ``replace``; nothing was changed.
        NewerSchema: if a newer weft wrote it.
    """
    with _opened(folder) as (backup, source):
        if not replace:
            with reading(engine) as target:
                _refuse_losses(source, target)
        with reading(engine) as target:
            buried = _buried(source, target)
        wanted = [digest for digest, _ in references(source) if digest not in buried]
        copies = BlobStore(Folder(folder / "blobs"))
        while True:
            missing = tuple(_fetched(copies, blobs, wanted, progress))
            with writing(engine) as target:
                lock(target, "weft restore")
                if not claim(target, blobs, sorted({*wanted} - {*missing})):
                    _unite_spends(source, target)
                    _write(source, target)
                    paused = tuple(_pause(target))
                    counting = select(func.count()).where(spends.c.void.is_(None))
                    return Restored(backup, missing, paused, target.scalar(counting) or 0)


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Backup, Connection]]:
    """Yield what a backup holds, and its rows as this weft would have written them."""
    backup = read_backup(folder)
    with tempfile.TemporaryDirectory(prefix="weft-restore-") as draft:
        rows = Path(draft) / "rows.db"
        shutil.copy(folder / backup.rows, rows)  # it is migrated, and the backup stays as it is
        source = connect(f"sqlite:///{rows}")
        try:
            migrate(source)
            with reading(source) as connection:
                yield backup, connection
        finally:
            source.dispose()


def _replaced() -> list[Table]:
    return [t for t in metadata.sorted_tables if t.name not in (*UNITED, *SKIPPED)]


def _refuse_losses(source: Connection, target: Connection) -> None:
    """Refuse if a table that is replaced has a row here which the backup does not have."""
    for table in _replaced():
        if target.execute(select(table).limit(1)).first() is None:
            continue
        columns = [
            column
            for column in table.columns
            if column is not _number_of(table) and not column.info.get("blob")
        ]
        known = {tuple(row) for row in source.execute(select(*columns))}
        lost = sum(tuple(row) not in known for row in target.execute(select(*columns)))
        if lost:
            raise StoreNotEmpty(
                f"this store has {lost} rows in {table.name} that the backup does not have as they "
                "are; restore into an empty store, or give --replace: then names, aliases, runs "
                "and clients become what they were in the backup (versions and spends are kept)"
            )


def _fetched(
    copies: BlobStore, blobs: BlobStore, wanted: Sequence[str], progress: Progress
) -> Iterator[str]:
    """Bring blobs back, each verified; yield those that neither side has whole."""
    progress(0, len(wanted))
    for done, digest in enumerate(wanted, 1):
        try:
            blobs.put_bytes(copies.fetch(digest))
        except (BlobMissing, BlobCorrupt):
            if not blobs.has(digest):
                yield digest
        progress(done, len(wanted))


def _buried(source: Connection, target: Connection) -> set[str]:
    """Return which updates of the backup are of clients that withdrew, by now or by then."""
    absent = {*source.scalars(select(withdrawals.c.client))}
    absent |= {*target.scalars(select(withdrawals.c.client))}
    kept = select(kept_updates.c.blob).where(kept_updates.c.client.in_(absent))
    return {digest for digest in source.scalars(kept) if digest is not None}


def _write(source: Connection, target: Connection) -> None:
    for table in reversed(_replaced()):
        target.execute(delete(table))
    there = {table.name: table for table in tables_of(source.engine)}
    for table in metadata.sorted_tables:
        if table.name in SKIPPED:
            continue
        number = _number_of(table)
        for page in pages(source, there[table.name]):
            if number is not None:  # it is counted anew, in the same order
                page = [{k: v for k, v in row.items() if k != number.name} for row in page]
            if table is parents:
                page = _renumbered(source, target, page)
            insert_missing(target, table, page)
            if table is versions:
                recipes = {row["id"]: json.loads(row["recipe"]) for row in page}
                record_contributions(target, recipes)
    _unite_histories(source, target)
    absent = select(withdrawals.c.client)
    target.execute(delete(clients).where(clients.c.name.in_(absent)))
    gone = newest_nodes().where(nodes.c.status.in_(("pending", "removed"))).subquery()
    target.execute(delete(clients).where(clients.c.node.in_(select(gone.c.name))))
    buried = kept_updates.c.client.in_(absent)
    target.execute(update(kept_updates).where(buried).values(blob=None))


def _renumbered(
    source: Connection, target: Connection, edges: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return edges of the backup by the numbers that their versions have in the store."""
    numbers = sorted({edge[end] for edge in edges for end in ("child", "parent")})
    there = select(versions.c.id, versions.c.number).where(versions.c.number.in_(numbers))
    was = {row.id: row.number for row in source.execute(there)}
    here = select(versions.c.id, versions.c.number).where(versions.c.id.in_(was))
    now = {was[row.id]: row.number for row in target.execute(here)}
    return [{**edge, "child": now[edge["child"]], "parent": now[edge["parent"]]} for edge in edges]


def _number_of(table: Table) -> Any:
    """Return the column that only counts rows; None if a table has none."""
    column = table.autoincrement_column
    return column if column is not None and column.name == "number" else None


def _unite_spends(source: Connection, target: Connection) -> None:
    """Make every spend here count that counts in the backup; the rest come with the rows.

    Raises:
        BadBackup: if one event is two different spends.
    """
    for row in source.execute(select(spends)).mappings():
        query = select(spends).where(spends.c.event == row["event"])
        here = target.execute(query).mappings().first()
        if here is None:
            continue
        if _facts(here) != _facts(row):
            raise BadBackup(
                f"the spend {row['event'][:12]} of {row['population']!r} is another one in this "
                "store; one of them belongs to another store: restore into an empty one"
            )
        if row["void"] is None and here["void"] is not None:
            same = spends.c.event == row["event"]
            target.execute(update(spends).where(same).values(void=None))


def _unite_histories(source: Connection, target: Connection) -> None:
    """Give each yanked version and each node the history of both sides, in the order of time."""
    for name, key in BY_TIME.items():
        table = metadata.tables[name]
        facts = [c for c in table.columns if c.name not in (key, "number", "created_at")]
        for subject in source.scalars(select(table.c[key]).distinct()).all():
            own = select(table.c.created_at, *facts).where(table.c[key] == subject)
            both = {tuple(row) for side in (source, target) for row in side.execute(own)}
            rows = [
                {key: subject, "number": number, "created_at": at}
                | {column.name: value for column, value in zip(facts, rest, strict=True)}
                for number, (at, *rest) in enumerate(sorted(both), 1)
            ]
            target.execute(delete(table).where(table.c[key] == subject))
            target.execute(insert(table), rows)


def _facts(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*_OF_A_SPEND, "assignment", "parameters"))


def _pause(target: Connection) -> Iterator[str]:
    """Pause the runs that were going on: whoever drove them may be doing so elsewhere."""
    going = select(runs.c.id, runs.c.token).where(runs.c.status.in_(("queued", "running")))
    for run, token in target.execute(going.order_by(runs.c.number)).all():
        append(target, run, "restored", {}, {"status": "paused", "token": token + 1})
        yield run
