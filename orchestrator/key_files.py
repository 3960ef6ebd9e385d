"""API keys in files, one on each line."""

from __future__ import annotations

from pathlib import Path


class NoKeys(ValueError):
    """A file of keys has none."""


def read_keys(path: Path | None) -> list[str]:
    """Return the keys in a file, one on each line; none for None.

    Raises:
        NoKeys: if there is a file and no key in it: it must not mean that none is needed.
    """
    if path is None:
        return []
    found = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not found:
        raise NoKeys(f"{path} holds no key; write one on each line")
    return found
