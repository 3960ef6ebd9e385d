"""The worker processes of a Ray backend: which are ready for work, and what became of the others.

A worker is ready when it has answered for itself: not while it starts, and not after it was told to
give up until it has. One that dies never is again.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.backends.base import Perform
from orchestrator.backends.ray_cluster import RayUnavailable, room
from orchestrator.backends.ray_worker import Look, Worker

_FAILED_STARTS = 3
_PATIENCE_S = 30.0


@dataclass(slots=True, eq=False)
class Seat:
    """A worker as the driver knows it.

    Attributes:
        actor: the process.
        gpus: that it takes.
        calls: how many it has had; numbers them.
        baseline: bytes of its own after its second assignment: model and libraries are there.
    """

    actor: Any
    gpus: float = 0.0
    calls: int = 0
    baseline: int = 0

    def has_grown(self, private: int, limit: float | None) -> bool:
        """Return whether it holds so much that it should be replaced.

        Args:
            private: bytes of its own after an assignment.
            limit: bytes; None for twice its baseline and at least 1 GiB above it.
        """
        if self.calls == 2:
            self.baseline = private
        if limit is not None:
            return private > limit
        return self.calls > 2 and private > max(2 * self.baseline, self.baseline + (1 << 30))


@dataclass(slots=True)
class Pool:
    """So many workers, replaced as they go.

    Args:
        size: number of workers, >= 1.
        threads: of each; the CPUs it takes.
        gpus: each takes, or None for what the first shows that it needs of the one it has.
        perform: what they do.
        grace_s: seconds to heed the word to give up.
        recycle_above_mb: as :class:`orchestrator.backends.ray.RayBackend` says.
        measured: whether the size is final. If not, one worker at a time gets work until it is
            known how much memory that takes. With ``gpus`` None it is not.
        most: workers that are of use, however small they are.
    """

    size: int
    threads: int
    gpus: float | None
    perform: Perform
    grace_s: float
    recycle_above_mb: float | None
    measured: bool = True
    most: int = sys.maxsize
    _idle: deque[Seat] = field(default_factory=deque, init=False)
    _busy: set[Seat] = field(default_factory=set, init=False)
    _starting: dict[Any, Seat] = field(default_factory=dict, init=False)
    _leaving: dict[Any, tuple[Seat, float]] = field(default_factory=dict, init=False)
    _failed_starts: int = field(default=0, init=False)
    _alone_since: float | None = field(default=None, init=False)

    def fill(self) -> None:
        """Start as many workers as are missing."""
        known = len(self._idle) + len(self._busy) + len(self._starting) + len(self._leaving)
        gpus = 1.0 if self.gpus is None else self.gpus
        for _ in range(self.size - known):
            kind = ray.remote(
                num_cpus=self.threads,
                num_gpus=gpus,
                max_restarts=0,
                concurrency_groups={"aside": 1},
                enable_task_events=False,  # Ray's server keeps 4 kB of each call, for 100,000
            )(Worker)
            actor = kind.remote(self.threads, self.perform)
            self._starting[actor.ping.remote()] = Seat(actor, gpus)

    @property
    def idle(self) -> bool:
        """Whether a worker is ready, and there is memory for it to work."""
        return bool(self._idle) and (self.measured or not self._busy)

    def take(self) -> Seat:
        """Return a worker that is ready, which is busy from now on."""
        seat = self._idle.popleft()
        self._busy.add(seat)
        return seat

    def keep(self, seat: Seat, private: int | None) -> None:
        """Take back a worker that has answered, or replace it if its memory has grown.

        Args:
            seat: the worker.
            private: bytes of its own now, or None if it did not say.
        """
        self._busy.discard(seat)
        limit = None if self.recycle_above_mb is None else 1e6 * self.recycle_above_mb
        if private is not None and seat.has_grown(private, limit):
            logging.getLogger(__name__).warning(
                "a worker holds %.0f MB of its own after %d assignments and is replaced",
                *(private / 1e6, seat.calls),
            )
            _kill([seat])
        else:
            self._seat(seat)

    def _seat(self, seat: Seat) -> None:
        """Have a worker wait for work, or replace one that holds more of a GPU than it needs."""
        if self.gpus is not None and seat.gpus > self.gpus:
            _kill([seat])
        else:
            self._idle.append(seat)

    def measure(self, look: Look) -> None:
        """Let as many workers work as the memory of machine and GPU holds, by one that does."""
        if self.measured:
            return
        self.measured = True
        if self.gpus is None:
            self._share_gpus(gpu_share(look.gpu_peak, look.gpu_total))
        machines = sum(node["Alive"] for node in ray.nodes() if node["Resources"].get("CPU"))
        fits = machines * fitting(look.peak, look.private, look.available)
        if fits < self.size:
            logging.getLogger(__name__).warning(
                "%d workers instead of %d: one takes up to %.0f MB of its own, and its machine has "
                "%.0f MB left; backend.workers overrides this",
                *(fits, self.size, look.peak / 1e6, look.available / 1e6),
            )
            spare = [self._idle.popleft() for _ in range(min(len(self._idle), self.size - fits))]
            _kill(spare)
            self.size = fits

    def _share_gpus(self, share: float) -> None:
        """Have workers take so much of a GPU each, and replace those that have one alone."""
        self.gpus = share
        self.size = min(self.most, room(self.threads, share))
        waiting, self._idle = self._idle, deque()
        for seat in waiting:
            self._seat(seat)
        logging.getLogger(__name__).info(
            "%d workers take %g of a GPU each, going by the first one's peak", self.size, share
        )

    def drop(self, seat: Seat) -> None:
        """Be done with a worker that has died, or is to."""
        self._busy.discard(seat)
        _kill([seat])  # a dead one may only be out of reach

    def leave(self, calls: Iterable[tuple[Any, Seat]]) -> None:
        """Tell workers to give up their calls; they are ready again when they have."""
        if not ray.is_initialized():  # they are gone, and asking would start a Ray anew
            return
        end = time.monotonic() + self.grace_s
        for ref, seat in calls:
            seat.actor.give_up.remote(seat.calls)
            self._busy.discard(seat)
            self._leaving[ref] = seat, end

    def awaited(self) -> list[Any]:
        """Return what workers that are not ready have yet to answer."""
        return [*self._starting, *self._leaving]

    def hear(self, ref: Any) -> None:
        """Take an answer of :meth:`awaited`.

        Raises:
            RayUnavailable: if one worker after another could not start, and there is no other.
        """
        if ref in self._starting:
            self._has_started(self._starting.pop(ref), ref)
            return
        seat, _ = self._leaving.pop(ref)
        try:
            self.keep(seat, ray.get(ref)[1])
        except ray.exceptions.RayTaskError:  # raised by a worker that is well
            self.keep(seat, None)
        except ray.exceptions.RayError:
            self.drop(seat)

    def _has_started(self, seat: Seat, ref: Any) -> None:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            _kill([seat])
            self._failed_starts += 1
            others = self._idle or self._busy or self._starting or self._leaving
            if not others and self._failed_starts >= _FAILED_STARTS:
                self._failed_starts = 0
                reason = str(error).strip().splitlines()[-1]
                raise RayUnavailable(f"no worker process can start: {reason}") from error
        else:
            self._failed_starts = 0
            self._seat(seat)

    def watch(self) -> None:
        """Kill workers that did not heed the word to give up; complain if none starts."""
        now = time.monotonic()
        for ref, (seat, end) in list(self._leaving.items()):
            if now > end and not answered(ref):
                del self._leaving[ref]
                _kill([seat])
        if not self._starting or self._idle or self._busy or self._leaving:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > _PATIENCE_S:
            self._alone_since = float("inf")  # once
            free = ray.available_resources()
            logging.getLogger(__name__).warning(
                "no worker has started for %.0f s; each takes %d CPUs and %g GPUs, and Ray has %g "
                "CPUs and %g GPUs free: others may be using them",
                *(_PATIENCE_S, self.threads, 1.0 if self.gpus is None else self.gpus),
                *(free.get("CPU", 0), free.get("GPU", 0)),
            )

    def close(self) -> None:
        """Stop all workers."""
        leaving = [seat for seat, _ in self._leaving.values()]
        _kill([*self._idle, *self._busy, *self._starting.values(), *leaving])
        for known in (self._idle, self._busy, self._starting, self._leaving):
            known.clear()


def fitting(peak: int, private: int, available: int) -> int:
    """Return how many workers fit into a machine on which one works already.

    Args:
        peak: the most bytes that one had for itself; 0 for not known, as ``available``.
        private: bytes that it has now.
        available: bytes that the machine could still give away, of which a tenth is left alone.
    """
    if not peak or not available:
        return sys.maxsize
    return 1 + max(0, int(0.9 * (available - (peak - private)) // peak))


def gpu_share(peak: int, total: int) -> float:
    """Return which part of a GPU a worker takes, so that as many as fit share it alike.

    Args:
        peak: the most bytes of it that one had; 0 for one that uses none, and needs no share.
        total: bytes that the GPU has, of which each worker gets a tenth more than its peak.

    >>> gpu_share(peak=10, total=80), gpu_share(peak=60, total=80), gpu_share(peak=0, total=80)
    (0.1428, 1.0, 0.0)
    """
    if not peak or not total:
        return 0.0
    fits = max(1, int(total // (1.1 * peak)))
    return int(10_000 / fits) / 10_000  # Ray counts in ten-thousandths


def answered(ref: Any) -> bool:
    """Return whether an answer is there: it is taken before its worker is killed."""
    return bool(ray.wait([ref], timeout=0)[0])


def _kill(seats: Iterable[Seat]) -> None:
    if ray.is_initialized():
        for seat in seats:
            ray.kill(seat.actor)
