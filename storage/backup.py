"""Backups: a folder with all rows as of one moment, and the blobs that they name.

``rows-….db`` is a store's database in SQLite, whatever the database it was copied from, so that a
backup also moves a store from SQLite to PostgreSQL or back. ``blobs`` is a place of blobs. The
manifest is written last: a folder without one is no backup. Copying into the same folder again adds
only the blobs that are new.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, select

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from storage.database import REVISION_TABLE, connect, migrate, reading, revision, writing
from storage.places import Folder, sync
from storage.references import references

MANIFEST = "manifest.json"
FORMAT = 1
_ROWS = re.compile(r"rows-[0-9a-f]{32}\.db")
_PAGE = 2_000

Progress = Callable[[int, int], None]
"""``progress(done, total)`` is told how many blobs were copied."""


class BadBackup(ValueError):
    """A folder is no backup, or one that is damaged or cannot be used here."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds.

    Attributes:
        created_at: of which moment its rows are, UTC, ISO 8601.
        schema: which migration they have.
        rows: name of their file.
        rows_sha256: hash of that file.
        counts: rows by table.
        num_blobs: how many blobs the rows name; None for a backup without blobs.
        missing: digests of those that were missing or corrupt where they were copied from.
        format: of the folder.
    """

    created_at: str
    schema: str
    rows: str
    rows_sha256: str
    counts: dict[str, int]
    num_blobs: int | None
    missing: tuple[str, ...]
    format: int = FORMAT


def back_up(
    engine: Engine,
    blobs: BlobStore | None,
    folder: Path,
    progress: Progress = lambda done, total: None,
) -> Backup:
    """Copy a store into a folder, beside its writers, and return what is there.

    Args:
        engine: the database, of any schema.
        blobs: its blobs; None copies rows only.
        folder: new, empty, or an earlier backup, which it replaces.
        progress: told how far the copying of blobs is.

    Raises:
        BadBackup: if the folder holds something else, or the database has no tables.
        OSError: if there is no space; an earlier backup in the folder is as it was.
    """
    _check_target(folder)
    schema = revision(engine)
    if schema is None:
        raise BadBackup("there is nothing to back up: the database has no tables yet")
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"rows-{uuid.uuid4().hex}.db"
    moment = datetime.now(UTC)
    try:
        counts, wanted = _copy_rows(engine, rows, schema, blobs is not None)
        missing = () if blobs is None else tuple(_copy_blobs(blobs, folder, wanted, progress))
        found = Backup(
            created_at=moment.isoformat(),
            schema=schema,
            rows=rows.name,
            rows_sha256=_hash(rows),
            counts=counts,
            num_blobs=None if blobs is None else len(wanted),
            missing=missing,
        )
        text = json.dumps(asdict(found), indent=2, sort_keys=True)
        Folder(folder).write(MANIFEST, text.encode())
    except BaseException:
        _remove_rows(rows)
        raise
    for other in folder.glob("rows-*.db"):
        if other != rows:
            _remove_rows(other)
    return found


def read_backup(folder: Path) -> Backup:
    """Return what a backup holds, its rows verified.

    Raises:
        BadBackup: if the folder is none, or it was changed.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text("utf-8"))
        found = Backup(**document | {"missing": tuple(document["missing"])})
    except (OSError, ValueError, TypeError, KeyError):
        raise BadBackup(
            f"{folder} is no whole backup: it has no {MANIFEST} that can be read; give a folder "
            "that weft store backup wrote"
        ) from None
    if found.format != FORMAT:
        raise BadBackup(
            f"{folder} is a backup of format {found.format}, and this weft reads {FORMAT}; "
            "upgrade weft"
        )
    rows = folder / found.rows
    if not _ROWS.fullmatch(found.rows) or not rows.is_file() or _hash(rows) != found.rows_sha256:
        raise BadBackup(
            f"the rows of the backup {folder} are not those that it was written with; it cannot "
            "be restored: use another"
        )
    return found


def tables_of(engine: Engine) -> list[Table]:
    """Return a database's tables as they are, those that others refer to first."""
    found = MetaData()
    found.reflect(engine)
    return [table for table in found.sorted_tables if table.name != REVISION_TABLE]


def pages(connection: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    """Yield a table's rows in the order of insertion, times in UTC."""
    query = select(table).order_by(*table.primary_key.columns)
    result = connection.execution_options(yield_per=_PAGE).execute(query)
    for rows in result.mappings().partitions(_PAGE):
        yield [{key: _portable(value) for key, value in row.items()} for row in rows]


def _copy_rows(
    engine: Engine, path: Path, schema: str, wants_blobs: bool
) -> tuple[dict[str, int], list[str]]:
    """Copy every row; return how many by table, and the digests that they name."""
    copy = connect(f"sqlite:///{path}")
    try:
        migrate(copy, schema)
        there = {table.name: table for table in tables_of(copy)}
        counts = {}
        with reading(engine) as source, writing(copy) as target:
            for table in tables_of(engine):
                if table.name in there:  # a database may hold other programs' tables
                    counts[table.name] = 0
                    for page in pages(source, table):
                        target.execute(there[table.name].insert(), page)
                        counts[table.name] += len(page)
        with reading(copy) as connection:
            wanted = [digest for digest, _ in references(connection)] if wants_blobs else []
    finally:
        copy.dispose()  # the last connection empties the log into the file
    sync(path)
    return counts, wanted


def _copy_blobs(
    blobs: BlobStore, folder: Path, wanted: list[str], progress: Progress
) -> Iterator[str]:
    """Copy blobs, each verified; yield the digests of those that cannot be had."""
    copies = BlobStore(folder / "blobs")
    progress(0, len(wanted))
    for done, digest in enumerate(wanted, 1):
        if not copies.has(digest):
            try:
                copies.replace(blobs.fetch(digest))
            except (BlobMissing, BlobCorrupt):
                yield digest
        progress(done, len(wanted))


def _portable(value: Any) -> Any:
    if isinstance(value, datetime):  # SQLite gives back a time without its zone, which is UTC
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value


def _check_target(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise BadBackup(f"{folder} is not empty and no backup; give a new folder")


def _remove_rows(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
