"""One thread that runs the model: it takes what waits into the batch between two steps.

Everything that touches the model or its adapters happens on this thread, so that an adapter comes
and goes between two steps and never within one. Nobody waits for anybody: who asks is told by
callbacks, in the order of the steps.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """As many requests wait as may.

    Attributes:
        retry_after_s: seconds after which the queue is likely to have room, >= 1.
    """

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Stopping(RuntimeError):
    """The server takes no more requests: it is about to end."""


class Event(Protocol):
    """Something that a request is told."""

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        ...


@dataclass(frozen=True, slots=True)
class Broken:
    """That a request will not be answered.

    Attributes:
        why: ``timeout``: not in time; ``error``: the model failed; ``stopped``: the server ended.
    """

    why: Literal["timeout", "error", "stopped"]

    @property
    def is_last(self) -> bool:
        """Always."""
        return True


class Worker(Protocol):
    """What runs the model: :class:`clients.serving.generating.Generator` and its like."""

    @property
    def num_running(self) -> int:
        """How many requests go on after a step."""
        ...

    def fits(self, chosen: Sequence[Any], another: Any) -> bool:
        """Return whether ``another`` may begin with ``chosen``."""
        ...

    def admit(self, asked: Sequence[tuple[int, Any]]) -> Sequence[tuple[int, Event]]:
        """Begin requests, and return what they are told first."""
        ...

    def step(self) -> Sequence[tuple[int, Event]]:
        """Go on with those that run."""
        ...

    def cancel(self, keys: Collection[int]) -> None:
        """End some."""
        ...


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way.

    Attributes:
        ask: what the worker is given.
        deadline: of ``time.monotonic``, after which it is given up.
        tell: called on the engine's thread with each event; must not block.
        key: which no other has.
        begun: whether it left the queue.
    """

    ask: Any = field(repr=False)
    deadline: float
    tell: Callable[[Event], None] = field(repr=False)
    key: int
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is: requests that wait and run, and steps and rows since it began."""

    waiting: int
    running: int
    steps: int
    rows: int


class Engine:
    """Requests that wait, and the thread that answers them.

    Args:
        worker: runs the model.
        most_waiting: requests that wait at most, >= 1; those of a batch come on top.
    """

    def __init__(self, worker: Worker, most_waiting: int) -> None:
        self._worker, self._most_waiting = worker, most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._left: set[int] = set()
        self._running: dict[int, Job] = {}
        self._keys = itertools.count()
        self._closing, self._stopped = False, False
        self._steps = self._rows = 0
        self._pace_s = 0.0  # between two requests that leave, smoothed
        self._last_end = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="weft-serve", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ask: Any, timeout_s: float, tell: Callable[[Event], None]) -> Job:
        """Have something answered, behind what waits already.

        Args:
            ask: for the worker.
            timeout_s: seconds until it is given up, waiting included, > 0.
            tell: see :class:`Job`.

        Raises:
            Overloaded: if too many wait.
            Stopping: if the engine was closed.
        """
        with self._changed:
            if self._closing:
                raise Stopping("the server is about to end; ask another one")
            if len(self._waiting) >= self._most_waiting:
                raise Overloaded(len(self._waiting), self._retry_after_s())
            job = Job(ask, time.monotonic() + timeout_s, tell, next(self._keys))
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give a request up that nobody waits for any more; it is told nothing."""
        with self._changed:
            self._left.add(job.key)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have ``function`` run between two steps; for what changes the model's adapters.

        Raises:
            Stopping: if the engine was closed.
        """
        done: Future[T] = Future()
        with self._changed:
            if self._stopped:
                raise Stopping("the engine has ended")
            self._calls.append((function, done))
            self._changed.notify()
        return done

    def load(self) -> Load:
        """Return how busy it is."""
        with self._changed:
            return Load(len(self._waiting), len(self._running), self._steps, self._rows)

    @property
    def is_alive(self) -> bool:
        """Whether its thread works."""
        return self._thread.is_alive()

    def close(self, drain: bool = True) -> None:
        """Take nothing more, and return when all is answered (``drain``) or told that it is not."""
        with self._changed:
            self._closing = True
            self._stopped = self._stopped or not drain
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            self._answer()
        except Exception:
            _LOG.exception("the thread that runs the model failed; nothing is answered any more")
        finally:
            self._end()

    def _end(self) -> None:
        """Leave nobody waiting for a thread that is not there any more."""
        with self._changed:
            self._closing = self._stopped = True
            calls, self._calls = self._calls, deque()
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for _, done in calls:
            done.set_exception(Stopping("the engine has ended"))
        for job in left:
            job.tell(Broken("stopped"))

    def _answer(self) -> None:
        while self._pause():
            self._run_calls()
            self._give_up()
            taken = self._take()
            if taken:
                asked = [(job.key, job.ask) for job in taken]
                self._tell(self._tried(partial(self._worker.admit, asked)))
            if self._worker.num_running:
                self._tell(self._tried(self._worker.step))
        self._run_calls()

    def _pause(self) -> bool:
        """Wait until there is something to do; return whether to go on."""
        with self._changed:
            while not (self._calls or self._waiting or self._running or self._left):
                if self._closing:
                    self._stopped = True
                    return bool(self._calls)
                self._changed.wait()
            return not self._stopped

    def _run_calls(self) -> None:
        while self._calls:
            function, done = self._calls.popleft()
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

    def _give_up(self) -> None:
        """End what nobody waits for any more, and what is too late."""
        now = time.monotonic()
        with self._changed:
            left, self._left = self._left, set()
            known = [*self._running.values(), *self._waiting]
            late = [job for job in known if job.deadline < now and job.key not in left]
            gone = left | {job.key for job in late}
            if gone:
                self._waiting = deque(job for job in self._waiting if job.key not in gone)
        if gone:
            self._worker.cancel(gone)
            self._running = {key: job for key, job in self._running.items() if key not in gone}
        for job in late:
            job.tell(Broken("timeout"))

    def _take(self) -> list[Job]:
        """Take from the queue what fits into the batch, first come first."""
        taken: list[Job] = []
        with self._changed:
            while self._waiting:
                asks = [job.ask for job in taken]
                if not self._worker.fits(asks, self._waiting[0].ask):
                    break
                taken.append(self._waiting.popleft())
        for job in taken:
            job.begun = True
            self._running[job.key] = job
        return taken

    def _tried(
        self, work: Callable[[], Sequence[tuple[int, Event]]]
    ) -> Sequence[tuple[int, Event]]:
        """Return what came of a step; if the model failed, that all who took part are told so."""
        try:
            found = work()
        except Exception:
            _LOG.exception("the model failed; the requests of its batch are not answered")
            keys = list(self._running)
            self._worker.cancel(keys)
            return [(key, Broken("error")) for key in keys]
        self._steps += 1
        self._rows += len(found)
        return found

    def _tell(self, events: Sequence[tuple[int, Event]]) -> None:
        for key, event in events:
            job = self._running[key]
            if event.is_last:
                del self._running[key]
                self._ended()
            job.tell(event)

    def _ended(self) -> None:
        now = time.monotonic()
        self._pace_s = 0.9 * self._pace_s + 0.1 * min(now - self._last_end, 60.0)
        self._last_end = now

    def _retry_after_s(self) -> int:
        return max(1, min(60, round(self._pace_s * len(self._waiting))))
