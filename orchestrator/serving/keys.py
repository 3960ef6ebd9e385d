"""API keys: who may ask."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.key_files import KnownKeys

KEYS_VARIABLE = "WEFT_API_KEYS"
_SHORTEST = 16


class BadApiKeys(ValueError):
    """API keys that cannot be used."""


class ApiKeys:
    """The keys that are let in.

    Args:
        keys: at least 16 characters each; none lets everybody in.

    Raises:
        BadApiKeys: if one is shorter.
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        if any(len(key) < _SHORTEST for key in keys):
            raise BadApiKeys(
                f"an API key has at least {_SHORTEST} characters, and one is shorter; make one "
                "with: openssl rand -hex 32"
            )
        self._known = KnownKeys(keys)

    def __bool__(self) -> bool:
        return bool(self._known)

    def admits(self, authorization: str | None) -> bool:
        """Return whether a header ``Bearer KEY`` is let in; takes as long for every wrong key."""
        if not self._known:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        return self._known.know(key.strip()) and scheme.lower() == "bearer"


def read_api_keys(file: Path | None) -> ApiKeys:
    """Return the keys of a file, one a line (``#`` begins a comment), else ``$WEFT_API_KEYS``.

    In the variable they are separated by commas.

    Raises:
        BadApiKeys: if there is a file without a key, or a key is too short.
        OSError: if the file cannot be read.
    """
    if file is None:
        given = os.environ.get(KEYS_VARIABLE, "").split(",")
        return ApiKeys(tuple(key.strip() for key in given if key.strip()))
    lines = [line.partition("#")[0].strip() for line in file.read_text("utf-8").splitlines()]
    keys = tuple(line for line in lines if line)
    if not keys:
        raise BadApiKeys(f"{file} has no API key; write one a line")
    return ApiKeys(keys)
