"""``fsck``: hashes every blob again, checks every row, and repairs what can be repaired.

It changes nothing unless it is asked to, and runs beside writers: rows are read as of one moment,
and a blob is older than its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import Engine

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore, digest_of
from storage.database import reading
from storage.garbage import dead_drafts, discard
from storage.integrity import Problem, row_problems
from storage.places import Entry, is_draft
from storage.references import references

Progress = Callable[[int, int], None]
"""``progress(done, total)`` is told how many blobs were hashed."""

_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Checkup:
    """What ``fsck`` found.

    Attributes:
        problems: what is wrong.
        orphans: digests of blobs that no row names, which ``gc`` is for; nothing is wrong.
        drafts: files that a writer left when it died; nothing is wrong.
        strangers: names of files that are neither; nothing is wrong.
        num_blobs: how many were hashed.
        num_bytes: what they hold.
    """

    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    drafts: tuple[Entry, ...]
    strangers: tuple[str, ...]
    num_blobs: int
    num_bytes: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, or no longer is."""
        return all(problem.repaired for problem in self.problems)


def fsck(
    engine: Engine,
    blobs: BlobStore,
    *,
    repair: bool = False,
    mirrors: Sequence[BlobStore] = (),
    progress: Progress = lambda done, total: None,
) -> Checkup:
    """Check a store, and with ``repair`` mend it.

    A blob that is missing or altered is written again from the cache or the first mirror that has
    it whole; an altered one that no row names is removed, as are drafts of dead writers. A row that
    is wrong stays: restore it from a backup.

    Args:
        engine: the database.
        blobs: its blobs.
        repair: whether anything may be changed.
        mirrors: other places that may hold the same blobs, such as a backup's.
        progress: told how far the hashing is.

    Raises:
        DatabaseUnavailable, BlobsUnavailable: if either cannot be read at all.
    """
    entries = list(blobs.place.entries())
    stored = {digest: e for e in entries if (digest := digest_of(e.name)) is not None}
    with reading(engine) as connection:
        problems = list(row_problems(connection))
        reached = references(connection)
    drafts = dead_drafts(entries, datetime.now(UTC))
    mend = _Mend(engine, blobs, mirrors) if repair else None
    num_bytes = 0
    wanted = sorted({*stored, *reached})
    progress(0, len(wanted))
    for done, (digest, problem, size) in enumerate(_checked(blobs, wanted, reached), 1):
        num_bytes += size
        if problem is not None:
            problems.append(mend(problem, digest, digest in reached) if mend else problem)
        progress(done, len(wanted))
    if repair:
        for draft in drafts:
            blobs.place.remove(draft.name)
    return Checkup(
        problems=tuple(problems),
        orphans=tuple(sorted(stored.keys() - reached.keys())),
        drafts=drafts,
        strangers=tuple(sorted(_strangers(entries))),
        num_blobs=len(wanted),
        num_bytes=num_bytes,
    )


def _strangers(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if digest_of(entry.name) is None and not is_draft(entry):
            yield entry.name


def _checked(
    blobs: BlobStore, digests: Sequence[str], reached: Mapping[str, str]
) -> Iterator[tuple[str, Problem | None, int]]:
    """Yield each digest, what is wrong with its blob, and its size; a few are read at once."""

    def look(digest: str) -> tuple[str, Problem | None, int]:
        by = reached.get(digest)
        suffix = f" ({by} names it)" if by else " (no row names it)"
        try:
            return digest, None, len(blobs.fetch(digest))
        except BlobMissing as error:
            if by is None:  # `gc` removed it meanwhile
                return digest, None, 0
            return digest, Problem("blob-missing", digest, f"{error.args[0]}{suffix}"), 0
        except BlobCorrupt as error:
            return digest, Problem("blob-corrupt", digest, f"{error}{suffix}"), 0

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(look, digests)


@dataclass(frozen=True, slots=True)
class _Mend:
    """Repairs a blob from where it is whole."""

    engine: Engine
    blobs: BlobStore
    mirrors: Sequence[BlobStore]

    def __call__(self, problem: Problem, digest: str, is_reached: bool) -> Problem:
        """Return the problem, with what was done about it."""
        if not is_reached and discard(self.engine, self.blobs, [digest]):
            return replace(problem, repaired="removed: no row names it")
        if self.blobs.cache is not None:
            with suppress(BlobMissing, BlobCorrupt, OSError):
                self.blobs.replace(BlobStore(self.blobs.cache).fetch(digest))
                return replace(problem, repaired="written again from the cache")
        for mirror in self.mirrors:
            with suppress(BlobMissing, BlobCorrupt):
                self.blobs.replace(mirror.fetch(digest))
                return replace(problem, repaired=f"written again from {mirror.place.where()}")
        return problem
