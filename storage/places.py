"""Where blobs lie: a folder here; :mod:`storage.buckets` has the same for a bucket elsewhere.

A place keeps named bytes and knows nothing of digests. It need not list at once what was written,
but reads must see it. A file whose last part begins with a dot is being written, or was when its
writer died.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES})


DRAFT_S = 3_600.0
"""Seconds after which a draft's writer is taken for dead: writing one takes seconds."""


class BlobsUnavailable(ConnectionError):
    """The place of the blobs cannot be reached, or refuses; nothing was written."""


class BadBlobsUrl(ValueError):
    """The blobs' url names no place that weft can use."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a place.

    Attributes:
        name: relative to the place, parts joined by ``/``.
        size_bytes: its size.
        modified_at: seconds since 1970; infinity where the place does not say.
    """

    name: str
    size_bytes: int
    modified_at: float


def is_draft(entry: Entry) -> bool:
    """Return whether a file is being written, or was when its writer died."""
    return entry.name.rpartition("/")[2].startswith(".")


class Place(Protocol):
    """Named bytes. Every method raises :class:`BlobsUnavailable` or ``OSError`` if it cannot."""

    def where(self, name: str = "") -> str:
        """Return how people call the place, or a file of it; without what may be a secret."""
        ...

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is not there."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it is not there."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Make a file hold ``data``, durably: whoever reads it meanwhile reads old or new bytes."""
        ...

    def take(self, files: Mapping[str, Path]) -> None:
        """Make files hold, durably, what files of this machine hold, which stay as they are.

        Args:
            files: by name; a file that is there already, and as long, is left alone.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file; what is not there is no error."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Yield every file; those in folders of one level in the order of their names."""
        ...


class Folder:
    """A folder of this machine; safe with any number of writers.

    Args:
        root: the folder; made by the first :meth:`write`.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def where(self, name: str = "") -> str:
        """Return the path."""
        return str(self._root / name)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is not there."""
        try:
            return (self._root / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it is not there."""
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Make a file hold ``data``; after a crash it holds all of it or is as it was.

        Raises:
            OSError: naming the file, if there is no space; nothing is left of it.
        """
        _write_atomically(self._root / name, data)

    def take(self, files: Mapping[str, Path]) -> None:
        """Make files hold what others do: as links where the disk is the same, else as copies."""
        folders = {self._root}
        for name, path in files.items():
            target = self._root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)  # even of what was there: who linked it may have died
            size = self.size(name)
            if size != path.stat().st_size and not (size is None and _is_linked(path, target)):
                self.write(name, path.read_bytes())
        for folder in sorted(folders):
            sync(folder)

    def remove(self, name: str) -> None:
        """Remove a file; what is not there is no error."""
        (self._root / name).unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """Yield every file in the order of names; those that vanish meanwhile may be left out."""
        yield from self._below("")

    def _below(self, folder: str) -> Iterator[Entry]:
        """Yield the files of a folder; what is held are the names in one."""
        try:
            with os.scandir(self._root / folder) as found:
                inside = sorted(found, key=lambda one: one.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for one in inside:
            if one.is_dir(follow_symlinks=False):
                yield from self._below(f"{folder}{one.name}/")
                continue
            with suppress(FileNotFoundError):
                facts = one.stat()
                yield Entry(f"{folder}{one.name}", facts.st_size, facts.st_mtime)


def _is_linked(path: Path, target: Path) -> bool:
    """Make ``target`` another name of a file; return whether the disk, or disks, can do that."""
    try:
        target.hardlink_to(path)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``; after a crash it holds all of it or is as it was."""
    new_folder = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(path.parent)
        if new_folder:
            sync(path.parent.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make durable what a file holds, or which names a folder has.

    Raises:
        OSError: naming ``path``, if there is no space.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)  # the system names none
        raise
    finally:
        os.close(handle)
