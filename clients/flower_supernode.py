"""Flower's SuperNode, which looks sooner: its pauses follow how long there was nothing to do.

    python -P -m clients.flower_supernode …     # as flower-supernode

Flower's own asks for orders every 3 s and for its worker's answer every 0.5 s, whatever happened a
moment ago, and waits 1 s, 2 s, 4 s … for a part of an order that is still on its way. Here looks
for orders are close together while rounds follow each other, and as rare as Flower's when none
has come for a minute; what its own worker does, a SuperNode can see at no cost. And it gives signs
of life more often, so that half a minute shows that it is gone, and not a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module

from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supernode.cli.flower_supernode import flower_supernode

from clients.pace import pause_after

LOOK_S = 0.2
"""Seconds between two looks for orders, at least: each is a request to the SuperLink."""

BEAT_S = 15
"""Seconds, twice which without a sign of life a SuperLink takes a node to be gone; it gives one
each 7 to 9."""

_WORKER_S = 0.05
_FLOWERS_LOOK_S = 3
_PART_S, _LONGEST_PART_S = 0.1, 1.0

_Push = Callable[[str, bytes], None]


class Pauses:
    """Stands where the SuperNode's loop has its clock, of which it uses :meth:`sleep` alone.

    Args:
        sleep: really sleeps.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._idle_since: float | None = None

    def sleep(self, seconds: float) -> None:
        """Sleep for what is left here of a pause of Flower's, of so many seconds."""
        if seconds < _FLOWERS_LOOK_S:  # it has an order, and waits for its worker
            self._idle_since = None
            self._sleep(_WORKER_S)
            return
        now = self._clock()
        if self._idle_since is None:
            self._idle_since = now
        self._sleep(pause_after(now - self._idle_since, LOOK_S, seconds))


def push_parts(
    parts: Iterable[tuple[str, bytes]],
    push_object_fn: _Push,
    push_all: Callable[[Iterable[tuple[str, bytes]], _Push], None],
) -> None:
    """Send an answer's parts; one that is not taken was there already, and does not end the rest.

    It is said not to be taken where it had arrived and only the word of that had not, since a
    connection broke. Flower's SuperNode forgets the whole answer then, half sent.
    """

    def push(name: str, content: bytes) -> None:
        try:
            push_object_fn(name, content)
        except ObjectPushError:
            return

    push_all(parts, push)


def quicken() -> None:
    """Have this process' SuperNode look sooner, and send on what a connection broke off."""
    loop = import_module("flwr.supernode.start_client_internal")
    pull, push = loop.pull_objects, loop.push_object_contents_from_iterable
    vars(loop).update(
        time=Pauses(),
        pull_objects=partial(pull, initial_backoff=_PART_S, backoff_cap=_LONGEST_PART_S),
        push_object_contents_from_iterable=partial(push_parts, push_all=push),
    )
    for name in ("flwr.supercore.heartbeat", "flwr.supernode.fleet_http_connection"):
        vars(import_module(name))["HEARTBEAT_DEFAULT_INTERVAL"] = BEAT_S


if __name__ == "__main__":
    quicken()
    flower_supernode()
