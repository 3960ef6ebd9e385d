"""``fsck``: hashes every blob again, checks every row, and repairs what can be repaired.

It changes nothing unless it is asked to, and runs beside writers: rows are read as of one moment,
and a blob is older than its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice

from sqlalchemy import Connection, Engine

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from storage.database import reading
from storage.garbage import dead_drafts, discard
from storage.integrity import Problem, row_problems
from storage.inventory import Digests, inventory, together
from storage.places import Entry, is_draft
from storage.references import references

Progress = Callable[[int, int], None]
"""``progress(done, total)`` is told how many blobs were hashed."""

_AT_ONCE = 4
_PAGE, _SOME = 64, 16


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
    stored, others = inventory(blobs.place.entries())
    with reading(engine) as connection:
        problems = list(row_problems(connection))
        wanted, names, orphans = _wanted(connection, stored)
    drafts = dead_drafts(others, datetime.now(UTC))
    mend = _Mend(engine, blobs, mirrors) if repair else None
    num_bytes = 0
    progress(0, len(wanted))
    for done, (digest, by, problem, size) in enumerate(_checked(blobs, wanted, names), 1):
        num_bytes += size
        if problem is not None:
            problems.append(mend(problem, digest, by != "") if mend else problem)
        progress(done, len(wanted))
    if repair:
        for draft in drafts:
            blobs.place.remove(draft.name)
    return Checkup(
        problems=tuple(problems),
        orphans=tuple(orphans),
        drafts=drafts,
        strangers=tuple(sorted(entry.name for entry in others if not is_draft(entry))),
        num_blobs=len(wanted),
        num_bytes=num_bytes,
    )


def _wanted(connection: Connection, stored: Digests) -> tuple[Digests, list[str], list[str]]:
    """Compare what is stored with what is reached.

    Returns:
        Every digest of either, each with the place of who names it in the second list, which begins
        with "" for nobody; and what is stored and not reached.
    """
    wanted, orphans = Digests(), []
    places = {"": 0}
    for digest, (_, by) in together(stored, references(connection)):
        wanted.add(digest, places.setdefault(by or "", len(places)))
        orphans += [] if by else [digest]
    return wanted, list(places), orphans


def _checked(
    blobs: BlobStore, wanted: Digests, names: Sequence[str]
) -> Iterator[tuple[str, str, Problem | None, int]]:
    """Yield each digest, who names it, what is wrong with its blob, and its size."""

    def look(one: tuple[str, int]) -> tuple[str, str, Problem | None, int]:
        digest, by = one[0], names[one[1]]
        suffix = f" ({by} names it)" if by else " (no row names it)"
        try:
            return digest, by, None, len(blobs.fetch(digest))
        except BlobMissing as error:
            if not by:  # `gc` removed it meanwhile
                return digest, by, None, 0
            problem = Problem("blob-missing", digest, f"{error.args[0]}{suffix}")
        except BlobCorrupt as error:
            problem = Problem("blob-corrupt", digest, f"{error}{suffix}")
        return digest, by, problem, 0

    def look_at(some: list[tuple[str, int]]) -> list[tuple[str, str, Problem | None, int]]:
        return [look(one) for one in some]

    rest = iter(wanted)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # A pool takes at once all that it is given, and handing over costs as much as a small blob.
        while page := [s for _ in range(_PAGE) if (s := list(islice(rest, _SOME)))]:
            for found in pool.map(look_at, page):
                yield from found


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
