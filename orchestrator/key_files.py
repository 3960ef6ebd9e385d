"""API keys: files of them, one on each line, and which are known."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path


class NoKeys(ValueError):
    """A file of keys has none."""


class BadKey(ValueError):
    """A key that no header can hold."""


class KnownKeys:
    """Some keys, kept as hashes.

    Args:
        keys: as they are shown.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, key: str) -> bool:
        """Return whether a key is one of them; takes as long for every wrong one."""
        given = hashlib.sha256(key.encode()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found)


def checked(key: str, source: str) -> str:
    """Return a key that a header can hold.

    Args:
        key: white space around it is cut off.
        source: where it is from, for the error, which does not show the key.

    Raises:
        BadKey: if it cannot.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadKey(f"a key in {source} has other than printable ASCII characters; make another")
    return key


def read_keys(path: Path | None) -> list[str]:
    """Return the keys in a file, one on each line; none for None.

    Raises:
        NoKeys: if there is a file and no key in it: it must not mean that none is needed.
        BadKey: if no header can hold one.
    """
    if path is None:
        return []
    lines = path.read_text("utf-8", "replace").splitlines()
    found = [checked(line, str(path)) for line in lines if line.strip()]
    if not found:
        raise NoKeys(f"{path} holds no key; write one on each line")
    return found
