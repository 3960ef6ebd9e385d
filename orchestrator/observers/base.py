"""The Observer protocol, and several observers as one whose errors stop nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

_LOG = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told each event of a run, in order, on the thread that drives it."""

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take note of an event; return at once, and pass over kinds it does not know."""
        ...

    def close(self) -> None:
        """Write what is left and give everything back; may be called twice."""
        ...


class Observers:
    """Several observers as one. One that fails is logged once, and the run goes on.

    Args:
        observers: each is told every event, in this order, and closed at the end.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._failed: set[int] = set()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Tell every observer."""
        for number, observer in enumerate(self._observers):
            try:
                observer(kind, data)
            except Exception:
                self._say(number, f"at the event {kind!r}")

    def close(self) -> None:
        """Close every observer."""
        for number, observer in enumerate(self._observers):
            try:
                observer.close()
            except Exception:
                self._say(number, "while it closed")

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _say(self, number: int, when: str) -> None:
        if number not in self._failed:
            self._failed.add(number)
            name = type(self._observers[number]).__name__
            _LOG.exception("%s failed %s; the run goes on, and this is said once", name, when)
