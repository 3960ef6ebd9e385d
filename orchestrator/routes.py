"""Which adapter of a vLLM server answers for a name, and who is being answered by which."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from clients.files import write_durably


class NoRoute(LookupError):
    """Nothing answers for this name."""


class BadState(ValueError):
    """A file of routes is none."""


class Switch(Protocol):
    """What decides which adapter answers: routes of this process, or a gateway elsewhere."""

    def flip(self, pointer: str, model: str) -> None:
        """Have ``model`` answer for ``pointer`` from now on."""
        ...

    def drop(self, pointer: str) -> None:
        """Have nothing answer for ``pointer`` from now on."""
        ...

    def leads(self, pointer: str) -> str | None:
        """Return the model that answers for ``pointer``, or None."""
        ...

    def in_flight(self, model: str) -> int:
        """Return how many requests are being answered by ``model``."""
        ...


class Routes:
    """The routes of a gateway; safe to use from several threads.

    A request takes its model and is counted in one step, so that a model that no route leads to
    and that nobody is counted for is never asked again.

    Args:
        pointers: ``NAME@ALIAS`` that are answered for.
        state: where routes are kept, so that a gateway that is started again has them; its own.

    Raises:
        BadState: if the file holds something else.
    """

    def __init__(self, pointers: Sequence[str], state: Path) -> None:
        self.pointers = tuple(dict.fromkeys(pointers))
        self._state = state
        self._lock = threading.Lock()
        self._flight: Counter[str] = Counter()
        self._models = {k: v for k, v in _read(state).items() if k in self.pointers}

    def names(self) -> dict[str, str]:
        """Return what requests may call each pointer: its name and itself, by what they call it.

        Of several aliases of one name, the name alone is the first.
        """
        found: dict[str, str] = {}
        for pointer in self.pointers:
            found.setdefault(pointer.partition("@")[0], pointer)
        return found | {pointer: pointer for pointer in self.pointers}

    def models(self) -> dict[str, str]:
        """Return the model that answers for each pointer that has one."""
        with self._lock:
            return dict(self._models)

    def flip(self, pointer: str, model: str) -> None:
        """Have ``model`` answer for ``pointer``, durably; who is being answered is not disturbed.

        Raises:
            NoRoute: if this pointer is none of those that are answered for.
        """
        if pointer not in self.pointers:
            raise NoRoute(
                f"{pointer} is not followed here (followed: {', '.join(self.pointers)}); start the "
                f"gateway with --follow {pointer}"
            )
        with self._lock:
            self._keep({**self._models, pointer: model})

    def drop(self, pointer: str) -> None:
        """Have nothing answer for ``pointer``, durably; who is being answered is not disturbed."""
        with self._lock:
            self._keep({one: model for one, model in self._models.items() if one != pointer})

    def _keep(self, models: dict[str, str]) -> None:
        if models != self._models:
            write_durably(self._state, json.dumps(models, sort_keys=True).encode())
        self._models = models

    def leads(self, pointer: str) -> str | None:
        """Return the model that answers for ``pointer``, or None."""
        return self.models().get(pointer)

    def in_flight(self, model: str) -> int:
        """Return how many requests are being answered by ``model``."""
        with self._lock:
            return self._flight[model]

    def flights(self) -> dict[str, int]:
        """Return how many requests each model is answering, without those that answer none."""
        with self._lock:
            return {model: count for model, count in self._flight.items() if count}

    @contextmanager
    def taken(self, name: str) -> Iterator[str]:
        """Yield the model that answers for ``name``; it counts as asked while the block lasts.

        Raises:
            NoRoute: if there is none.
        """
        pointer = self.names().get(name)
        with self._lock:
            model = self._models.get(pointer or "")
            if model is not None:
                self._flight[model] += 1
        if model is None:
            raise NoRoute(f"nothing is deployed for {pointer} yet" if pointer else "")
        try:
            yield model
        finally:
            with self._lock:
                self._flight[model] -= 1


def _read(state: Path) -> Mapping[str, str]:
    if not state.exists():
        return {}
    try:
        found: dict[str, str] = json.loads(state.read_bytes())
        if all(model.startswith(f"{pointer}:") for pointer, model in found.items()):
            return found
    except (ValueError, AttributeError):
        pass
    raise BadState(
        f"{state} holds no routes of a gateway, which are JSON, by NAME@ALIAS; remove it, and "
        "deploy again"
    )
