"""Ray workers: processes that keep one base model, while clients come and go as data.

A round's broadcast, underlay and memory are put into Ray's object store once, and each worker takes
them out once, however many clients it serves. An update's tensors come back through the store and
are copied out when its turn has come, so that the driver holds one update at a time. A worker that
dies is replaced and its assignment is tried once more elsewhere; a dead worker never receives work
again. A worker gets its next assignment when it has answered: one that waited behind a slow client
could not go to a worker that is free.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, cast

import numpy as np
import ray
import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from clients.worker import perform
from orchestrator.backends.base import TICK_S, Failure, Result, Started, failure
from strategies.base import Broadcast, Tensors, Update

Perform: TypeAlias = Callable[[Assignment], Update | Evaluation]
Arrays: TypeAlias = Mapping[str, tuple[str, tuple[int, ...], Any]]
_Work: TypeAlias = tuple[dict[str, Any], str, dict[str, str]]
"""An assignment's plain fields, what is trainable, and its parts' keys: each names a content."""

_FIELDS = [f.name for f in fields(Assignment) if f.name not in ("broadcast", "underlay", "memory")]
_ATTEMPTS = 2
_MIB = 1 << 20


class RayUnavailable(RuntimeError):
    """Ray could not be started or joined."""


class _Worker:
    """A process with one resident base model, training one client at a time."""

    def __init__(self, threads: int, perform: Perform) -> None:
        torch.set_num_threads(threads)
        self._perform = perform
        self._parts: dict[str, Tensors] = {}

    def perform(self, work: _Work, *arrays: Arrays) -> Any:
        """Return an update, an Evaluation or a Failure; an update's tensors as arrays beside it.

        Args:
            work: the assignment but for its tensors.
            arrays: the contents of its parts in order. What an earlier client needed too is not
                copied out of the store again; what this one does not need is forgotten.
        """
        known = self._parts
        self._parts = {
            key: known[key] if key in known else _tensors(content)
            for key, content in zip(work[-1].values(), arrays, strict=True)
        }
        assignment = _joined(work, self._parts)
        try:
            result = self._perform(assignment)
        except Exception as error:  # a client's failure is a value
            return failure(assignment, error)
        if isinstance(result, Evaluation) or not (result.tensors or result.memory):
            return result
        bare = replace(result, tensors={}, memory={})
        return bare, _arrays(result.tensors), _arrays(result.memory)


@dataclass(slots=True)
class _Job:
    assignment: Assignment
    attempts: int = 0


class _Queue:
    """What is to do: what a dead worker left first, then what comes."""

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
class RayBackend:
    """Runs assignments on local Ray workers, or on those of a cluster.

    Args:
        workers: number of worker processes, >= 1.
        threads: intra-op threads a worker, >= 1.
        gpus: GPUs a worker, may be a fraction.
        address: of a Ray cluster to join, or None for a local one.
        perform: what a worker does with an assignment; importable at the workers.

    Raises:
        RayUnavailable: if Ray cannot be started or joined.
    """

    workers: int
    threads: int = 1
    gpus: float = 0.0
    address: str | None = None
    perform: Perform = perform
    _idle: deque[Any] = field(default_factory=deque, init=False)
    _mine: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not ray.is_initialized():
            _start_ray(self.address, self.workers * self.threads)
            self._mine = True
        self._idle.extend(self._spawn() for _ in range(self.workers))

    def run(
        self, assignments: Iterable[Assignment | None], started: Started
    ) -> Generator[Result | None]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`."""
        put, queue = _Once(), _Queue(assignments)
        running: dict[Any, tuple[_Job, Any]] = {}
        ready: deque[Any] = deque()
        try:
            while queue.open or running or ready:
                while len(running) < self.workers and (job := queue.take()):
                    job.attempts += 1
                    worker = self._idle.popleft() if self._idle else self._spawn()
                    call = worker.perform.remote(*_split(job.assignment, put))
                    running[call] = (job, worker)
                    started(job.assignment)
                if ready:  # workers go on while this one is copied out and looked at
                    yield _result(ready.pop())
                    continue
                done = _wait(list(running))
                for ref in done:
                    job, worker = running.pop(ref)
                    answer = self._answer(ref, job, worker)
                    if answer is None:
                        queue.again(job)
                    else:
                        ready.append(answer)
                    del answer  # it holds its place in the store
                if not done and (running or queue.open):
                    yield None
        finally:
            _kill(worker for _, worker in running.values())  # nobody waits for them any more

    def close(self) -> None:
        """Stop the workers, and Ray if this backend started it."""
        _kill(self._idle)
        self._idle.clear()
        if self._mine:
            ray.shutdown()

    def _spawn(self) -> Any:
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_restarts": 0}
        return ray.remote(_Worker).options(**options).remote(self.threads, self.perform)

    def _answer(self, ref: Any, job: _Job, worker: Any) -> Any:
        """Return what a finished call returned; None if it is to be tried again elsewhere."""
        try:
            value = ray.get(ref)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            _kill([worker])  # it may only be out of reach
            if job.attempts < _ATTEMPTS:
                return None
            reason = f"the worker process died {job.attempts} times"
            if "creation task" in str(error):  # no data has reached it
                reason = f"no worker process can start: {str(error).splitlines()[-1]}"
            return Failure(job.assignment.client, job.assignment.round, reason)
        except ray.exceptions.RayTaskError as error:
            self._idle.append(worker)
            return failure(job.assignment, error.cause or error)
        self._idle.append(worker)
        return value


def _wait(calls: list[Any]) -> list[Any]:
    """Return a call that is done, if one is within a tick."""
    if not calls:
        time.sleep(TICK_S)
        return []
    done: list[Any] = ray.wait(calls, num_returns=1, timeout=TICK_S)[0]
    return done


def _kill(workers: Iterable[Any]) -> None:
    if ray.is_initialized():  # if not they are gone, and asking would start a Ray anew
        for worker in workers:
            ray.kill(worker)


def _start_ray(address: str | None, cpus: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            store = max(78 * _MIB, min(2048 * _MIB, available // 16))
            ray.init(num_cpus=max(cpus, os.cpu_count() or 1), object_store_memory=store, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot start"
        raise RayUnavailable(f"{where} ({error}); backend: inline needs no Ray") from error


class _Once:
    """Puts a mapping of tensors into the object store once, by identity."""

    def __init__(self) -> None:
        self._refs: dict[int, tuple[Tensors, Any]] = {}

    def __call__(self, tensors: Tensors) -> Any:
        if id(tensors) not in self._refs:
            self._refs[id(tensors)] = (tensors, ray.put(_arrays(tensors)))  # the id stays theirs
        return self._refs[id(tensors)][1]


def _split(assignment: Assignment, put: _Once) -> tuple[Any, ...]:
    """Return the arguments of a worker's call: the assignment but for its tensors, and those.

    The fields go as they are: making, pickling and replacing an Assignment without tensors shows
    in the time of an empty call.
    """
    sent = assignment.broadcast
    parts = {
        "tensors": sent.tensors,
        "mask": sent.mask,
        "extra": sent.extra,
        "underlay": assignment.underlay,
        "memory": assignment.memory,
    }
    refs = {name: put(part) for name, part in parts.items() if part}
    values = {name: getattr(assignment, name) for name in _FIELDS}
    return (values, sent.trainable, {name: ref.hex() for name, ref in refs.items()}), *refs.values()


def _joined(work: _Work, parts: Mapping[str, Tensors]) -> Assignment:
    """Return the assignment as it was, with the parts that it names by their keys."""
    values, trainable, keys = work
    tensors, mask, extra, underlay, memory = (
        parts[keys[name]] if name in keys else {}
        for name in ("tensors", "mask", "extra", "underlay", "memory")
    )
    sent = Broadcast(tensors, trainable, mask, extra)
    return Assignment(broadcast=sent, underlay=underlay, memory=memory, **values)


def _result(answer: Any) -> Result:
    """Return what a worker answered, an update with tensors that own their memory."""
    if not isinstance(answer, tuple):
        return cast(Evaluation | Failure, answer)
    bare, tensors, memory = answer
    return replace(cast(Update, bare), tensors=_tensors(tensors), memory=_tensors(memory))


def _arrays(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """Return tensors as raw byte arrays, which Ray writes and maps without a copy; any dtype."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in tensors.items()
    }


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return tensors in memory of their own, and of theirs together: the store is read-only.

    One allocation is kept and used again by the C library; one a tensor would be handed back to the
    system and cost a page fault every 4 KiB, ten times the copy itself.
    """
    found: dict[str, Tensor] = {}
    memory = np.empty(sum(_aligned(array.size) for _, _, array in arrays.values()), np.uint8)
    start = 0
    for name, (dtype, shape, array) in arrays.items():
        own = memory[start : start + array.size]
        own[:] = array
        found[name] = torch.from_numpy(own).view(getattr(torch, dtype)).reshape(shape)
        start += _aligned(array.size)
    return found


def _aligned(size: int) -> int:
    """Return ``size`` rounded up to 64 bytes: any dtype may begin there."""
    return -(-size // 64) * 64
