"""Work that must not slow a run: done in order on one thread, dropped where the queue is full."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class Delivery:
    """Calls functions one after another on a thread of its own, which starts with the first.

    Args:
        name: of the thread, and of who speaks in the log.
        size: how many calls may wait; one that finds no room is dropped and counted.
        patience_s: seconds that :meth:`close` waits for what is left.
    """

    def __init__(self, name: str, size: int = 1000, patience_s: float = 10.0) -> None:
        self.name, self.dropped = name, 0
        self.closing = threading.Event()
        self._patience_s = patience_s
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread: threading.Thread | None = None
        self._failed = False

    def __call__(self, work: Callable[[], None]) -> None:
        """Have ``work`` done later, or count it as dropped; returns at once."""
        if self.closing.is_set():
            return
        if self._thread is None:
            # a daemon: a receiver that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a while for what is left, and say what was lost."""
        if self.closing.is_set() or self._thread is None:
            self.closing.set()
            return
        self.closing.set()
        end = time.monotonic() + self._patience_s
        try:
            self._waiting.put(None, timeout=self._patience_s)
        except queue.Full:
            self.dropped += 1
        self._thread.join(max(0.0, end - time.monotonic()))
        lost = self.dropped + (self._waiting.qsize() if self._thread.is_alive() else 0)
        if lost or self._thread.is_alive():
            _LOG.warning(
                "%s: %d messages were not delivered%s",
                self.name,
                lost,
                ", and one was still under way" if self._thread.is_alive() else "",
            )

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            try:
                work()
            except Exception:
                if not self._failed:
                    _LOG.exception("%s failed; the run goes on, and this is said once", self.name)
                self._failed = True
