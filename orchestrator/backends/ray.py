"""Ray workers: processes that keep one base model, while clients come and go as data.

A worker gets its next assignment when it has answered: one that waited behind a slow client could
not go to a worker that is free. Until a worker has answered for itself it gets none: not when it
is new, and not while it has yet to heed the word to give up. A worker that dies, or is silent for
too long, is replaced, and its assignment goes to another; only an assignment that costs several
workers is its client's failure. A worker whose memory grows is replaced between assignments, which
costs nobody anything.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from clients.assignment import Assignment
from clients.worker import perform
from orchestrator.backends.base import (
    TICK_S,
    Failure,
    Perform,
    Result,
    Started,
    Stepped,
    failure,
    unheard,
)
from orchestrator.backends.ray_cluster import RayUnavailable, SharedRay, free_room, room, share_ray
from orchestrator.backends.ray_payload import Once, result_of, split
from orchestrator.backends.ray_pool import Pool, Seat, answered
from orchestrator.backends.ray_worker import Look

__all__ = ["RayBackend", "RayUnavailable"]

_LOG = logging.getLogger(__name__)
_LOST = 3
_LOOK_S = 1.0
_MEASURED_STEPS = 2  # gradients, optimizer state and a batch's activations have all been there


@dataclass(slots=True)
class _Job:
    assignment: Assignment
    lost: list[str] = field(default_factory=list)
    """Why it has no result yet, once for each worker that it was lost with."""


@dataclass(slots=True)
class _Running:
    """A call that has not answered: whose it is, and when it was last heard of."""

    job: _Job
    seat: Seat
    heard: float
    asked: float
    beats: int = 0
    look: Any = None


class _Queue:
    """What is to do: what was lost with a worker first, then what comes."""

    def __init__(self, assignments: Iterable[Assignment | None]) -> None:
        self._coming = iter(assignments)
        self._again: deque[_Job] = deque()
        self.open = True

    def again(self, job: _Job) -> None:
        """Put back what is to be tried once more."""
        self._again.append(job)
        self.open = True

    def take(self) -> _Job | None:
        """Return the next job, or None if there is none now; ``open`` says if there may be one."""
        if self._again:
            return self._again.popleft()
        for assignment in self._coming:
            return None if assignment is None else _Job(assignment)
        self.open = False
        return None


@dataclass(slots=True)
class _Run:
    """One call of :meth:`RayBackend.run`: what is to do, what runs and what is done."""

    pool: Pool
    queue: _Queue
    started: Started
    stepped: Stepped
    heartbeat_s: float
    put: Once = field(default_factory=Once)
    ready: deque[Any] = field(default_factory=deque)
    running: dict[Any, _Running] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether there may be a result yet."""
        return bool(self.queue.open or self.running or self.ready)

    def send(self) -> None:
        """Give every worker that is ready something to do."""
        self.pool.fill()
        while self.pool.idle and (job := self.queue.take()):
            seat, now = self.pool.take(), time.monotonic()
            seat.calls += 1
            call = seat.actor.perform.remote(seat.calls, *split(job.assignment, self.put))
            self.running[call] = _Running(job, seat, now, now)
            self.started(job.assignment)

    def listen(self) -> bool:
        """Take what comes within a tick; return whether anything did."""
        looks = [r.look for r in self.running.values() if r.look is not None]
        calls = [*self.running, *self.pool.awaited(), *looks]
        if not calls:
            time.sleep(TICK_S)
        done = ray.wait(calls, num_returns=1, timeout=TICK_S)[0] if calls else []
        for ref in done:
            if ref in self.running:
                self._answered(ref)
            elif ref in looks:
                self._looked(ref)
            else:
                self.pool.hear(ref)
        self._watch()
        return bool(done)

    def _answered(self, ref: Any) -> None:
        running = self.running.pop(ref)
        job, seat = running.job, running.seat
        try:
            answer, private = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # raised by a worker that is well
            self.ready.append(failure(job.assignment, error.cause or error))
            self.pool.keep(seat, None)
        except ray.exceptions.RayError:
            self.pool.drop(seat)
            self._lost(job, "the worker process died")
        else:
            self.ready.append(answer)
            if not self.pool.measured and job.assignment.action != "init":
                with suppress(ray.exceptions.RayError):  # the next one will tell
                    self.pool.measure(ray.get(seat.actor.look.remote()))
            self.pool.keep(seat, private)

    def _lost(self, job: _Job, why: str) -> None:
        """Have a job tried again, unless it has cost too many workers."""
        job.lost.append(why)
        if len(job.lost) < _LOST:
            self.queue.again(job)
            return
        reason = f"{why} {len(job.lost)} times"
        if len(set(job.lost)) > 1:
            reason = f"{len(job.lost)} workers were lost with it: {'; '.join(job.lost)}"
        self.ready.append(Failure(job.assignment.client, job.assignment.round, reason))

    def _looked(self, ref: Any) -> None:
        """Take note of how far a worker is."""
        [running] = [r for r in self.running.values() if r.look == ref]
        running.look = None
        try:
            look: Look = ray.get(ref)
        except ray.exceptions.RayError:
            return  # its call will say so
        if look.number != running.seat.calls:
            return  # of an earlier assignment
        if look.step >= _MEASURED_STEPS:
            self.pool.measure(look)
        if look.beats != running.beats:
            running.beats, running.heard = look.beats, time.monotonic()
            self.stepped(running.job.assignment, look.step, look.steps)

    def _watch(self) -> None:
        """Ask the workers how far they are; give up on those that are silent for too long."""
        now = time.monotonic()
        for ref, running in list(self.running.items()):
            if now - running.heard > self.heartbeat_s and not answered(ref):
                del self.running[ref]
                self.pool.drop(running.seat)
                self._lost(running.job, f"the worker made no progress for {self.heartbeat_s:g} s")
            elif running.look is None and now - running.asked >= _LOOK_S:
                running.asked, running.look = now, running.seat.actor.look.remote()
        self.pool.watch()


@dataclass(slots=True)
class RayBackend:
    """Runs assignments on local Ray workers, or on those of a cluster.

    Args:
        workers: number of worker processes, >= 1, or None for as many as CPUs, GPUs, clients and
            memory allow: one works alone until its peak is known.
        threads: intra-op threads a worker, >= 1.
        gpus: GPUs a worker, may be a fraction; None measures it: one works alone on a GPU for two
            steps, and its peak says how many share one.
        address: of a Ray cluster to join, or None for a local one.
        perform: what a worker does with an assignment; importable at the workers.
        heartbeat_s: a worker without progress for so many seconds is taken to hang; longer than the
            base model takes to load, and than a microbatch.
        grace_s: seconds that a worker has to heed the word to give up before it is killed.
        recycle_above_mb: MB (10^6 bytes) of its own memory above which a worker is replaced after
            an assignment; None goes by how it grows.
        clients: how many there are to serve; more workers than that are of no use.

    Raises:
        RayUnavailable: if Ray cannot be started or joined, or has no room for a worker.
    """

    workers: int | None
    threads: int = 1
    gpus: float | None = 0.0
    address: str | None = None
    perform: Perform = perform
    heartbeat_s: float = 600.0
    grace_s: float = 30.0
    recycle_above_mb: float | None = None
    clients: int | None = None
    _pool: Pool = field(init=False)
    _ray: SharedRay | None = field(init=False)

    def __post_init__(self) -> None:
        shared = share_ray(self.address, (self.workers or 1) * self.threads)
        try:
            self._pool = self._filled()
        except BaseException:
            shared.release()
            raise
        self._ray = shared

    def _filled(self) -> Pool:
        """Return a pool of as many workers as there is room for, which start."""
        gpus = 1.0 if self.gpus is None else self.gpus
        places, free = room(self.threads, gpus), free_room(self.threads, gpus)
        wanted = self.workers or min(places, self.clients or places)
        each = f"each takes {self.threads} CPUs and {gpus:g} GPUs"
        if places < wanted and self.gpus is not None:
            _LOG.warning(
                "Ray has room for %d of the %d workers asked for (%s); the run goes on with %d",
                *(places, wanted, each, places),
            )
        if free < min(places, wanted):
            _LOG.warning(
                "%d of the run's %d workers wait for room (%s): what Ray has is in use by others; "
                "each starts when there is room for it",
                *(min(places, wanted) - free, min(places, wanted), each),
            )
        pool = Pool(
            min(places, wanted),
            self.threads,
            self.gpus,
            self.perform,
            grace_s=self.grace_s,
            recycle_above_mb=self.recycle_above_mb,
            measured=self.workers is not None and self.gpus is not None,
            most=self.workers or self.clients or sys.maxsize,
        )
        pool.fill()
        return pool

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`.

        Raises:
            RayUnavailable: if no worker process can start.
        """
        run = _Run(self._pool, _Queue(assignments), started, stepped, self.heartbeat_s)
        spoken = time.monotonic()
        try:
            while run.open:
                run.send()
                if run.ready:  # workers go on while this one is copied out and looked at
                    yield result_of(run.ready.pop())
                    spoken = time.monotonic()
                    continue
                heard = run.listen()
                late = time.monotonic() - spoken >= TICK_S  # many workers are heard of all the time
                if run.open and not run.ready and (late or not heard):
                    yield None
                    spoken = time.monotonic()
        finally:
            self._pool.leave((ref, running.seat) for ref, running in run.running.items())

    def close(self) -> None:
        """Stop the workers, and Ray where it was started for backends and this is the last."""
        self._pool.close()
        if self._ray is not None:
            self._ray.release()
            self._ray = None
