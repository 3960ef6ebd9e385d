"""Many digests at once, in their order, at some 40 bytes of memory each.

``fsck`` and ``gc`` compare what lies in a place with what rows name. Both come in the order of
digests, so that comparing them is walking along both, whatever their number.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from storage.blobs import digest_of
from storage.places import Entry


class Digests:
    """Digests in the order in which they were added, each with a number >= 0."""

    __slots__ = ("_names", "_numbers")

    def __init__(self) -> None:
        self._names = bytearray()
        self._numbers = array("Q")

    def add(self, digest: str, number: int) -> None:
        """Add a digest and its number."""
        self._names += bytes.fromhex(digest)
        self._numbers.append(number)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Yield each digest and its number."""
        for place, number in enumerate(self._numbers):
            yield self._names[32 * place : 32 * place + 32].hex(), number


def inventory(entries: Iterable[Entry]) -> tuple[Digests, list[Entry]]:
    """Return the blobs among files, with their sizes in bytes, and the files that are none.

    Args:
        entries: of a place, whose blobs come in the order of their digests.
    """
    blobs, others = Digests(), []
    for entry in entries:
        digest = digest_of(entry.name)
        if digest is None:
            others.append(entry)
        else:
            blobs.add(digest, entry.size_bytes)
    return blobs, others


def together(*sources: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield every digest of any source once, in order, with what each source has for it, or None.

    Args:
        *sources: digests with anything but None; each in order, each digest once.
    """
    marked = (_marked(source, place) for place, source in enumerate(sources))
    for digest, rows in groupby(heapq.merge(*marked), key=itemgetter(0)):
        found: list[Any] = [None] * len(sources)
        for _, place, value in rows:
            found[place] = value
        yield digest, found


def _marked(source: Iterable[tuple[str, Any]], place: int) -> Iterator[tuple[str, int, Any]]:
    for digest, value in source:
        yield digest, place, value
