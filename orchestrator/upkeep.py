"""Keeping a store sound: check, repair and clean it, back it up, bring it back, upgrade it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import func, select

from clients.files import write_durably
from clients.keys import has_key
from clients.sources import is_elsewhere
from orchestrator.closing import finish_closing
from orchestrator.retention import COORDINATOR, coordinator_keys
from orchestrator.workspace import Workspace, open_workspace, place_of
from storage import backup, garbage, restoring, schema
from storage import fsck as checking
from storage.backup import Backup
from storage.blobs import BlobStore
from storage.buckets import open_place
from storage.cache import Cache
from storage.database import connect, migrate, reading, refuse_newer, revision, where
from storage.fsck import Checkup, Progress
from storage.garbage import GRACE_S, Collection
from storage.places import DRAFT_S
from storage.restoring import Restored

_DRAFT = re.compile(r"tmp[a-z0-9_]{8}")
_FOLDERS = ("bases", "central", "runs", "sites")


@dataclass(frozen=True, slots=True)
class HomeCheckup:
    """What ``weft fsck`` found.

    Attributes:
        store: versions, names, runs and blobs.
        drafts: files in the home that a writer left when it died.
    """

    store: Checkup
    drafts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a store lies, and how much of it there is.

    Attributes:
        database: where its rows are, without a password.
        schema: of the rows.
        versions: how many.
        names: how many.
        runs: how many.
        updates: how many client updates are kept.
        blobs: where the blobs are.
        cache: folder of copies of blobs that lie elsewhere, or None.
        cache_bytes: what it holds.
        cache_limit_bytes: what it may hold.
    """

    database: str
    schema: str
    versions: int
    names: int
    runs: int
    updates: int
    blobs: str
    cache: str | None
    cache_bytes: int
    cache_limit_bytes: int


def standing(workspace: Workspace) -> Standing:
    """Return where a store lies, and how much of it there is."""
    tables = (schema.versions, schema.names, schema.runs)
    kept = select(func.count(schema.kept_updates.c.blob.distinct()))
    with reading(workspace.engine) as connection:
        versions, names, runs = (
            connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables
        )
        updates = connection.scalar(kept) or 0
    cache = workspace.blobs.cache
    limited = cache if isinstance(cache, Cache) else None
    return Standing(
        where(workspace.engine),
        schema.HEAD,
        versions,
        names,
        runs,
        updates,
        workspace.blobs.place.where(),
        limited.where() if limited else None,
        limited.used_bytes() if limited else 0,
        limited.limit_bytes if limited else 0,
    )


def fsck(
    workspace: Workspace,
    repair: bool = False,
    mirrors: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> HomeCheckup:
    """Check a workspace, and with ``repair`` mend it; see :func:`storage.fsck.fsck`.

    Args:
        workspace: which.
        repair: whether anything may be changed.
        mirrors: folders or urls of blobs, such as ``BACKUP/blobs``, to fetch from.
        progress: told how many blobs were hashed, of how many.

    Raises:
        BadBlobsUrl, BlobsUnavailable: if a mirror cannot be read.
    """
    others = [BlobStore(open_place(mirror)) for mirror in mirrors]
    drafts = tuple(_drafts(workspace.home))
    found = checking.fsck(
        workspace.engine, workspace.blobs, repair=repair, mirrors=others, progress=progress
    )
    if repair:
        _remove(drafts)
    return HomeCheckup(found, drafts)


def gc(
    workspace: Workspace, delete: bool = False, grace_s: float = GRACE_S
) -> tuple[Collection, tuple[Path, ...]]:
    """Find, or ``delete``, what nothing reaches; see :func:`storage.garbage.collect`.

    With ``delete`` the keys go, too, of runs whose driver died when it had closed them.

    Returns:
        What was found among the blobs, and the drafts of dead writers in the home.
    """
    drafts = tuple(_drafts(workspace.home))
    found = garbage.collect(workspace.engine, workspace.blobs, delete_them=delete, grace_s=grace_s)
    if delete:
        _remove(drafts)
        finish_closing(workspace.home, workspace.ledger)
    return found, drafts


def back_up(
    workspace: Workspace, folder: str | Path, progress: Progress = lambda done, total: None
) -> Backup:
    """Copy versions, names, runs, clients, spends and blobs; see :func:`storage.backup.back_up`.

    The notes on where base models are go with them. What is private to clients (``sites``), the
    keys of sums (``central``) and updates that were not aggregated yet (``runs``) do not.
    """
    found = backup.back_up(workspace.engine, workspace.blobs, Path(folder), progress)
    _copy_notes(workspace.home, Path(folder))
    return found


def restore(
    workspace: Workspace,
    folder: str | Path,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[Restored, tuple[str, ...], HomeCheckup]:
    """Bring a backup back, and check the store; see :func:`storage.restoring.restore`.

    A private run that was not finished is cancelled unless its clients' keys are in this home, or
    at sites, which keep them: with other keys they would answer an assignment a second time, with
    other noise, which is not what the ledger has recorded.

    Returns:
        What came back, the ids of the runs that were cancelled, and what ``fsck`` says.
    """
    found = restoring.restore(workspace.engine, workspace.blobs, Path(folder), replace, progress)
    _copy_notes(Path(folder), workspace.home)
    cancelled = tuple(_without_keys(workspace))
    for run in cancelled:
        reason = "restored without its clients' keys; clone it"
        workspace.ledger.record(run, "cancelled", {"reason": reason}, status="cancelled")
    return found, cancelled, fsck(workspace, True, [str(Path(folder) / "blobs")])


def upgrade(
    home: str | Path | None = None, database: str | None = None
) -> tuple[str | None, Path | None, HomeCheckup]:
    """Bring a store of an older weft up to date: back its rows up, migrate them, check it.

    Blobs are the same in every schema and are not copied. Client updates that an older weft kept in
    the home become blobs of the store, even where the schema is the newest already.

    Returns:
        The schema that it had, the backup (None where nothing was to do), and what ``fsck`` says.

    Raises:
        NewerSchema: if a newer weft wrote it.
        OSError, BlobsUnavailable: if updates cannot be stored; do it again when they can.
    """
    place, url = place_of(home, database)
    engine, saved = connect(url), None
    try:
        before = revision(engine)
        refuse_newer(engine)
        if before not in (None, schema.HEAD):
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
            saved = place / "backups" / f"schema-{before}-{stamp}"
            backup.back_up(engine, None, saved)
            migrate(engine)
    finally:
        engine.dispose()
    workspace = open_workspace(place, url)
    try:
        from orchestrator.taking_in import take_in  # torch, which no other upkeep needs

        take_in(workspace)
        return before, saved, fsck(workspace)
    finally:
        workspace.close()


def _without_keys(workspace: Workspace) -> Iterator[str]:
    """Yield the unfinished private runs that asked somebody whose key should be here and is not."""
    away = {one.name for one in workspace.ledger.clients() if is_elsewhere(one.data)}
    for record in workspace.ledger.runs(limit=1_000_000):
        privacy = record.config.get("privacy")
        if record.status in ("completed", "cancelled") or not privacy:
            continue
        if privacy.get("insecure_seed") is not None:
            continue
        asked = {row.client for row in workspace.ledger.spends_of_run(record.id)}
        keys, place = asked - away, workspace.home / "sites"
        if privacy.get("level") == "client":  # one key, of the sum
            keys, place = asked and {COORDINATOR}, coordinator_keys(workspace.home)
        if not all(has_key(place, record.id, whose) for whose in keys):
            yield record.id


def _copy_notes(here: Path, there: Path) -> None:
    """Copy the notes on where base models are."""
    for note in sorted((here / "bases").glob("*.json")):
        (there / "bases").mkdir(parents=True, exist_ok=True)
        write_durably(there / "bases" / note.name, note.read_bytes())


def _drafts(home: Path) -> Iterator[Path]:
    """Yield the files that :func:`clients.site.write_durably` left when its process was killed."""
    before = time.time() - DRAFT_S
    for folder in _FOLDERS:
        for path in sorted((home / folder).rglob("tmp*")):
            if _DRAFT.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
                yield path


def _remove(drafts: Sequence[Path]) -> None:
    for path in drafts:
        path.unlink(missing_ok=True)
