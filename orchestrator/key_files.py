"""API keys in files, one on each line."""

from __future__ import annotations

from pathlib import Path


class NoKeys(ValueError):
    """A file of keys has none."""


class BadKey(ValueError):
    """A key that no header can hold."""


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
