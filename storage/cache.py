"""A folder of limited size for copies of blobs that lie elsewhere."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from storage.places import DRAFT_S, Folder, is_draft

DEFAULT_LIMIT = "20GiB"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_LOOKS = 16
"""How often the folder is looked at while the limit is written once: others write to it too."""


class BadCacheLimit(ValueError):
    """The limit of the cache of blobs is no size."""


class Cache(Folder):
    """A folder that holds no more than a limit: what was not read for longest gives way.

    Any number of processes may share it. Each looks at it again after writing a sixteenth of the
    limit, so that together they may be above it by as much each. A file that is being written is
    left alone.

    Args:
        root: the folder; made by the first :meth:`write`.
        limit_bytes: how much it may hold, > 0.
    """

    def __init__(self, root: str | Path, limit_bytes: int) -> None:
        super().__init__(root)
        self.limit_bytes = limit_bytes
        self._room = 0
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it is not there; it counts as used now."""
        data = super().read(name)
        if data is not None:
            with suppress(OSError):  # it gave way meanwhile, or is somebody else's
                os.utime(self.where(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Make a file hold ``data``, after making room; what is larger than all is not kept.

        Raises:
            OSError: as :meth:`storage.places.Folder.write`.
        """
        if len(data) > self.limit_bytes:
            return
        with self._lock:
            if self._room < len(data):
                self._room = self._make_room(len(data))
            self._room -= len(data)
        super().write(name, data)

    def used_bytes(self) -> int:
        """Return what it holds."""
        return sum(entry.size_bytes for entry in self.entries())

    def _make_room(self, wanted: int) -> int:
        """Remove what is due and return how much may be written until the next look."""
        files, used, alive = [], 0, time.time() - DRAFT_S
        for entry in self.entries():
            if not is_draft(entry):
                files.append((entry.modified_at, entry.name, entry.size_bytes))
                used += entry.size_bytes
            elif entry.modified_at < alive:
                self.remove(entry.name)
            else:
                used += entry.size_bytes
        share = max(wanted, self.limit_bytes // _LOOKS)
        for _, name, size in sorted(files):
            if used + share <= self.limit_bytes:
                break
            self.remove(name)
            used -= size
        return share


def parse_limit(text: str) -> int:
    """Return the bytes in a size such as ``20GiB``, ``500MB`` or ``0``.

    Raises:
        BadCacheLimit: if it is none.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise BadCacheLimit(
            f"the limit of the cache of blobs is a size such as {DEFAULT_LIMIT} or 500MB, or 0 for "
            f"no cache, got {text!r}; set WEFT_BLOB_CACHE to one"
        )
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[letter])
