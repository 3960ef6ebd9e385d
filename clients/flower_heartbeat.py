"""Signs of life of a claimed task of Flower's, given beside the work at it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from clients.flower_runtime import Refused, RuntimeGone, TaskLost

BEAT_S = 10.0
"""Seconds between two signs of life; whoever gives none for 60 loses its task."""


class Heartbeat:
    """Gives signs of life of a task beside the work at it, until it is stopped or in vain.

    Attributes:
        lost: set when they are in vain: the task is somebody else's by now, or nobody's.
    """

    def __init__(self, beat: Callable[[], None], every_s: float = BEAT_S) -> None:
        """Start.

        Args:
            beat: gives one; raises TaskLost where it comes too late.
            every_s: seconds between them, > 0.
        """
        self.lost = threading.Event()
        self._stop = threading.Event()
        self._beat, self._every_s = beat, every_s
        self._thread = threading.Thread(target=self._run, name="flower-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; returns when the last one is through."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._beat()
                pause = self._every_s
            except (RuntimeGone, Refused):  # it may come back in time
                pause = min(1.0, self._every_s)
            except TaskLost:
                self.lost.set()
                return
            self._stop.wait(pause)
