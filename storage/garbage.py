"""``gc``: removes the blobs that nothing reaches, in two passes, beside any number of writers.

Versions are never removed: rows are history. What is removed are blobs of commits that were cut
short, and drafts of writers that died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, delete, select, update

from storage.blobs import BlobStore
from storage.database import in_byte_order, insert_or_update, lock, reading, writing
from storage.inventory import Digests, inventory, together
from storage.places import DRAFT_S, Entry, is_draft
from storage.references import LOCK, blob_columns, references
from storage.schema import condemned

GRACE_S = 86_400.0
"""Seconds that a condemned blob is kept."""

_BATCH = 50
_PAGE = 10_000

Named = Callable[[Connection, Sequence[str]], set[str]]
"""``named(connection, digests)`` returns which of these a row names."""


@dataclass(frozen=True, slots=True)
class Condemned:
    """A blob that nothing reaches.

    Attributes:
        digest: its name.
        size_bytes: its size.
        since: when it was first found so, UTC.
    """

    digest: str
    size_bytes: int
    since: datetime


@dataclass(frozen=True, slots=True)
class Collection:
    """What a pass of ``gc`` found, and did unless it was a dry run.

    Attributes:
        removed: blobs whose grace was over.
        waiting: blobs that a later pass removes, unless somebody needs them.
        drafts: unfinished files whose writer died.
        num_reached: digests that the database names.
    """

    removed: tuple[Condemned, ...]
    waiting: tuple[Condemned, ...]
    drafts: tuple[Entry, ...]
    num_reached: int

    @property
    def removed_bytes(self) -> int:
        """What the removed blobs and drafts held."""
        blobs = sum(one.size_bytes for one in self.removed)
        return blobs + sum(one.size_bytes for one in self.drafts)


def collect(
    engine: Engine,
    blobs: BlobStore,
    *,
    delete_them: bool = False,
    grace_s: float = GRACE_S,
    moment: datetime | None = None,
) -> Collection:
    """Find the blobs that nothing reaches; condemn the new ones, remove those whose grace is over.

    Args:
        engine: the database that reaches blobs.
        blobs: where they are.
        delete_them: without it nothing is changed, and ``removed`` is what would be.
        grace_s: seconds between the pass that condemns a blob and one that may remove it, >= 0.
        moment: now; by default the clock's.

    Raises:
        ValueError: if ``grace_s`` is negative.
        BlobsUnavailable: if the blobs cannot be listed or removed.
    """
    if grace_s < 0:
        raise ValueError(f"the grace must be >= 0 seconds, got {grace_s:g}")
    at = moment or datetime.now(UTC)
    stored, others = inventory(blobs.place.entries())  # before the rows: what comes is not listed
    drafts = dead_drafts(others, at, grace_s)
    if delete_them:
        with writing(engine) as connection:
            lock(connection, LOCK)
            num_reached, rescued, waiting = _condemned(connection, stored, at)
            _note(connection, rescued, waiting)
    else:
        with reading(engine) as connection:
            num_reached, _, waiting = _condemned(connection, stored, at)
    over = at - timedelta(seconds=grace_s)
    due = [one for one in waiting if one.since <= over]
    if delete_them:
        due = list(_removed(engine, blobs, due, at))
        for draft in drafts:
            blobs.place.remove(draft.name)
    kept = {one.digest for one in due}
    return Collection(
        tuple(due), tuple(w for w in waiting if w.digest not in kept), drafts, num_reached
    )


def dead_drafts(
    entries: Sequence[Entry], moment: datetime, grace_s: float = 0.0
) -> tuple[Entry, ...]:
    """Return the unfinished files among ``entries`` that nobody can be writing any more."""
    before = moment.timestamp() - max(grace_s, DRAFT_S)
    return tuple(e for e in entries if is_draft(e) and e.modified_at <= before)


def _condemned(
    connection: Connection, stored: Digests, at: datetime
) -> tuple[int, list[str], list[Condemned]]:
    """Compare what is stored with what is reached.

    Returns:
        How many digests are reached, which of them were condemned, and what is stored and not
        reached, oldest condemnation first.
    """
    num_reached, rescued, found = 0, [], []
    known = (condemned.c.digest, condemned.c.condemned_at, condemned.c.removed_at)
    query = select(*known).order_by(in_byte_order(connection, condemned.c.digest))
    rows = connection.execute(query.execution_options(yield_per=_PAGE))
    before = ((digest, at if removed else since) for digest, since, removed in rows)
    for digest, (size, by, since) in together(stored, references(connection), before):
        if by is not None:
            num_reached += 1
            rescued += [] if since is None else [digest]
        elif size is not None:
            found.append(Condemned(digest, size, since or at))
    return num_reached, rescued, sorted(found, key=lambda one: (one.since, one.digest))


def _note(connection: Connection, rescued: Sequence[str], waiting: Sequence[Condemned]) -> None:
    """Write down what is condemned, and forget what is reached all the same."""
    rows = [
        {
            "digest": one.digest,
            "size_bytes": one.size_bytes,
            "condemned_at": one.since,
            "removed_at": None,
        }
        for one in waiting
    ]
    insert_or_update(connection, condemned, rows)
    for start in range(0, len(rescued), _BATCH):
        batch = condemned.c.digest.in_(rescued[start : start + _BATCH])
        connection.execute(delete(condemned).where(batch))


def _removed(
    engine: Engine, blobs: BlobStore, due: Sequence[Condemned], at: datetime
) -> Iterator[Condemned]:
    """Remove what is still condemned, and yield it; writers wait for a batch at most."""
    for start in range(0, len(due), _BATCH):
        batch = {one.digest: one for one in due[start : start + _BATCH]}
        with writing(engine) as connection:
            lock(connection, LOCK)
            still = condemned.c.digest.in_(batch) & condemned.c.removed_at.is_(None)
            digests = connection.scalars(select(condemned.c.digest).where(still)).all()
            for digest in digests:
                blobs.remove(digest)
            connection.execute(
                update(condemned).where(condemned.c.digest.in_(digests)).values(removed_at=at)
            )
        yield from (batch[digest] for digest in digests)


def discard(
    engine: Engine, blobs: BlobStore, digests: Sequence[str], named: Named | None = None
) -> list[str]:
    """Remove blobs at once that no row names, and return which.

    A writer that is about to name one finds it gone and puts it again.

    Args:
        engine: the database that reaches blobs.
        blobs: where they are.
        digests: of which blobs.
        named: returns which of some digests a row names, where less than a look at every row of
            every table tells.
    """
    removed: list[str] = []
    for start in range(0, len(digests), _BATCH):
        batch = digests[start : start + _BATCH]
        with writing(engine) as connection:
            lock(connection, LOCK)
            kept = (named or _named)(connection, batch)
            due = sorted({*batch} - kept)
            at = datetime.now(UTC)
            row = {"size_bytes": 0, "condemned_at": at, "removed_at": at}
            insert_or_update(connection, condemned, [{**row, "digest": digest} for digest in due])
            for digest in due:
                blobs.remove(digest)
        removed += due
    return removed


def _named(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Return which digests any row names; reads every row."""
    return {
        digest
        for column in blob_columns()
        for digest in connection.scalars(select(column).where(column.in_(digests)))
    }
