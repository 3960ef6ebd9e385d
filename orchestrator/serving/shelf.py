"""What is served now: which version answers for which alias, and who is still being answered.

A request borrows the version that its name stands for at that moment, and keeps it to its end. An
alias that moves is one assignment: requests after it get the new version, those before it finish on
the old one, which is unloaded when the last of them has.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from clients.assignment import Task
from storage.refs import quoted

_PREFIX = re.compile(r"[0-9a-f]{12,64}")


class UnknownModel(LookupError):
    """Nothing is served under this name."""


@dataclass(frozen=True, slots=True)
class Served:
    """A version that is loaded.

    Attributes:
        version: its id: the hash of its content, so that nothing can be kept under it that is not
            it; of the base model alone, its hash.
        slot: of the bank.
        kind: what it is for.
        labels: in order; empty for ``causal-lm``.
        max_length: tokens of a text at most, as it was trained.
    """

    version: str
    slot: int
    kind: Task
    labels: tuple[str, ...] = ()
    max_length: int = 0


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A version that a request is answered with, and the name that it was asked for by."""

    served: Served
    pointer: str


class Shelf:
    """The versions that are loaded. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Served] = {}
        self._pointers: dict[str, str] = {}
        self._borrowed: Counter[tuple[str, str]] = Counter()

    def put(self, served: Served) -> None:
        """Take a version in, for which no alias stands yet."""
        with self._lock:
            self._loaded[served.version] = served

    def point(self, pointer: str, version: str) -> None:
        """Have a name stand for a version that is loaded, from the next request on.

        Args:
            pointer: ``NAME@ALIAS``, or the base model's name.
            version: full id.

        Raises:
            KeyError: if it is not loaded.
        """
        with self._lock:
            self._pointers[pointer] = self._loaded[version].version

    def pointers(self) -> dict[str, Served]:
        """Return which version stands for each name."""
        with self._lock:
            return {pointer: self._loaded[v] for pointer, v in self._pointers.items()}

    def get(self, version: str) -> Served | None:
        """Return a version if it is loaded."""
        with self._lock:
            return self._loaded.get(version)

    @contextmanager
    def borrowed(self, model: str) -> Iterator[Borrowed]:
        """Keep the version that a request asks for until it is answered.

        Args:
            model: ``NAME@ALIAS``; ``NAME`` where one alias of it is served; the id of a version
                that an alias stands for, or at least 12 digits of it.

        Raises:
            UnknownModel: if it stands for none.
        """
        with self._lock:
            found = self._find(model)
            key = (found.pointer, found.served.version)
            self._borrowed[key] += 1
        try:
            yield found
        finally:
            with self._lock:
                self._borrowed[key] -= 1
                if not self._borrowed[key]:
                    del self._borrowed[key]

    def is_drained(self, pointer: str) -> bool:
        """Return whether no request to this name is being answered by another version than now."""
        with self._lock:
            now = self._pointers.get(pointer)
            return all(name != pointer or version == now for name, version in self._borrowed)

    def take_unused(self) -> list[Served]:
        """Take out and return the versions that no name stands for and nobody borrows."""
        with self._lock:
            needed = {*self._pointers.values(), *(version for _, version in self._borrowed)}
            unused = [one for v, one in self._loaded.items() if v not in needed]
            for one in unused:
                del self._loaded[one.version]
            return unused

    def _find(self, model: str) -> Borrowed:
        if model in self._pointers:
            return Borrowed(self._loaded[self._pointers[model]], model)
        named = [p for p in self._pointers if p.partition("@")[0] == model]
        if len(named) == 1:
            return Borrowed(self._loaded[self._pointers[named[0]]], named[0])
        if _PREFIX.fullmatch(model):
            standing = {v for v in self._pointers.values() if v.startswith(model)}
            if len(standing) == 1:
                return Borrowed(self._loaded[standing.pop()], "")
        choice = "; choose one" if named else ""
        raise UnknownModel(
            f"no model {quoted(model)} is served here{choice} (there are: "
            f"{', '.join(named or sorted(self._pointers))})"
        )
