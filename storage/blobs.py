"""Tensors as files named by the hash of their content.

A blob is a safetensors file without metadata. Equal tensors are equal bytes whatever the order of
the names, the strides or the device, so that a digest names values and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from storage.places import Folder, Place

if TYPE_CHECKING:
    from torch import Tensor

# Encoding is imported where it is used: torch takes seconds, and most commands read no tensor.

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobMissing(LookupError):
    """No blob has this digest."""


class BlobCorrupt(RuntimeError):
    """A blob's bytes are not those that its name says."""


class BlobStore:
    """Blobs in a place, ``ab/cdef...`` by digest; safe with any number of writers.

    Args:
        place: where they lie; a path is a folder, made by the first :meth:`put`.
        cache: a nearer place for what was read or written; any of it may be removed at any time.
    """

    def __init__(self, place: str | Path | Place, cache: Place | None = None) -> None:
        self.place: Place = Folder(place) if isinstance(place, str | Path) else place
        self.cache = cache

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Store ``tensors`` and return their digest; they are durable when it returns.

        Costs one copy of the tensors in memory. What is stored already is not written again.

        Raises:
            BadTensor: if a value is not finite, a dtype is none of float, integer and boolean, or a
                name cannot be stored.
            OSError, BlobsUnavailable: if they cannot be written; nothing is stored.
        """
        from storage.encoding import canonical_bytes

        return self.put_bytes(canonical_bytes(tensors))

    def put_bytes(self, data: bytes) -> str:
        """Store bytes that are a blob's and return their digest; as :meth:`put`."""
        digest = hashlib.sha256(data).hexdigest()
        name = name_of(digest)
        # A file of another size is the remains of a bad disk or copy: storing it again heals it.
        if self.place.size(name) != len(data):
            self.place.write(name, data)
        self._remember(name, data)
        return digest

    def adopt(self, files: Mapping[str, Path]) -> None:
        """Store files that are blobs as they are, by digest; they are durable when it returns.

        The files stay. In a folder on their disk nothing is written: a blob is a link to its file,
        which nobody may change afterwards. The cache is left alone.

        Raises:
            OSError, BlobsUnavailable: if they cannot be stored; some may be.
        """
        self.place.take({name_of(digest): path for digest, path in files.items()})

    def get(self, digest: str) -> dict[str, Tensor]:
        """Return the tensors called ``digest``, in order of their names.

        Raises:
            BlobMissing: if there are none.
            BlobCorrupt: if the file was changed or cut short.
            BlobsUnavailable: if their place cannot be reached.
        """
        from storage.encoding import decoded

        return decoded(self.get_bytes(digest))

    def get_bytes(self, digest: str) -> bytes:
        """Return the bytes called ``digest``, verified. Raises as :meth:`get`."""
        name = name_of(digest)
        near = self.cache.read(name) if self.cache else None
        if near is not None:
            if hashlib.sha256(near).hexdigest() == digest:
                return near
            assert self.cache is not None
            self.cache.remove(name)
        data = self.fetch(digest)
        self._remember(name, data)
        return data

    def fetch(self, digest: str) -> bytes:
        """Return the bytes called ``digest``, verified, past the cache. Raises as :meth:`get`."""
        name = name_of(digest)
        data = self.place.read(name)
        if data is None:
            raise BlobMissing(
                f"no blob {digest[:12]} in {self.place.where()}; get it from a backup with weft "
                "fsck --repair --mirror PLACE, or point weft at the place that belongs to this "
                "database"
            )
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise BlobCorrupt(
                f"blob {digest[:12]} is corrupt: {self.place.where(name)} has {len(data)} bytes "
                f"that hash to {found[:12]}; get it from a backup with weft fsck --repair "
                "--mirror PLACE"
            )
        return data

    def has(self, digest: str) -> bool:
        """Return whether there is a file for ``digest``; whether it is whole, only reading tells.

        Raises:
            BlobMissing: if it is no digest.
            BlobsUnavailable: if the place cannot be reached.
        """
        return self.place.size(name_of(digest)) is not None

    def replace(self, data: bytes) -> str:
        """Store bytes whatever is stored under their digest, and return that."""
        digest = hashlib.sha256(data).hexdigest()
        self.place.write(name_of(digest), data)
        return digest

    def remove(self, digest: str) -> None:
        """Remove a blob, from the cache too; what is not there is no error."""
        for place in (self.place, self.cache):
            if place is not None:
                place.remove(name_of(digest))

    def digest(self, tensors: Mapping[str, Tensor]) -> str:
        """Return the digest that :meth:`put` would, without writing.

        Raises:
            BadTensor: as :meth:`put`.
        """
        from storage.encoding import canonical_bytes

        return hashlib.sha256(canonical_bytes(tensors)).hexdigest()

    def _remember(self, name: str, data: bytes) -> None:
        """Keep bytes in the cache, where there is one and it has room."""
        if self.cache is not None:
            with suppress(OSError):
                if self.cache.size(name) != len(data):
                    self.cache.write(name, data)


def is_digest(text: str) -> bool:
    """Return whether a text is a SHA-256 as blobs are named by: 64 hex digits, lower case."""
    return _DIGEST.fullmatch(text) is not None


def name_of(digest: str) -> str:
    """Return the name of a blob's file in its place.

    Raises:
        BlobMissing: if it is no digest.
    """
    if not is_digest(digest):
        raise BlobMissing(f"a blob's digest is 64 hex digits, got {digest!r}")
    return f"{digest[:2]}/{digest[2:]}"


def digest_of(name: str) -> str | None:
    """Return which blob's file this is by its name, or None if it is none's."""
    digest = name.replace("/", "", 1)
    return digest if is_digest(digest) and name[2] == "/" else None
