"""The process at the other end of a Ray actor: one resident base model, one client at a time.

A second thread answers how far the first is and takes word to give up, which the first heeds at its
next microbatch: the process and its warm model are kept.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from clients.evaluate import Evaluation
from clients.pace import GivenUp
from orchestrator.backends.base import Perform, failure
from orchestrator.backends.ray_payload import Arrays, Work, joined, to_arrays, to_tensors
from strategies.base import Tensors

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Look:
    """What a worker says of itself while it works.

    Attributes:
        number: of the call that it works at.
        beats: how often that has made progress; the same again means none since.
        step: steps done of what it works at.
        steps: in all; 0 where that is not known yet.
        private: bytes of memory that are its own; see :func:`private_bytes`.
        peak: the most bytes that were.
        available: bytes of memory that its machine could still give away; 0 for not known.
        gpu_peak: the most bytes of its GPU that it had, with what CUDA itself takes; 0 for none.
        gpu_total: bytes that its GPU has.
    """

    number: int
    beats: int
    step: int
    steps: int
    private: int = 0
    peak: int = 0
    available: int = 0
    gpu_peak: int = 0
    gpu_total: int = 0


class Worker:
    """A process with one resident base model, training one client at a time."""

    def __init__(self, threads: int, perform: Perform) -> None:
        torch.set_num_threads(threads)
        self._perform = perform
        self._parts: dict[str, Tensors] = {}
        self._look = Look(0, 0, 0, 0)
        self._unwanted = 0

    def ping(self) -> int:
        """Return the process' id, which says that it is there and ready for work."""
        return os.getpid()

    def perform(self, number: int, work: Work, *arrays: Arrays) -> Any:
        """Return an answer, and the bytes of memory that are the process' own now.

        The answer is an Evaluation, a Failure, or an update with its tensors as arrays beside it.

        Args:
            number: of the call, each above the last.
            work: the assignment but for its tensors.
            arrays: the contents of its parts in order. What an earlier client needed too is not
                copied out of the store again; what this one does not need is forgotten.
        """
        known = self._parts
        self._parts = {
            key: known[key] if key in known else to_tensors(content)
            for key, content in zip(work[-1].values(), arrays, strict=True)
        }
        assignment = joined(work, self._parts)
        self._look = Look(number, 0, 0, 0)
        try:
            result = self._perform(assignment, self._stepped)
        except Exception as error:  # a client's failure is a value
            return failure(assignment, error), private_bytes()
        if isinstance(result, Evaluation) or not (result.tensors or result.memory):
            return result, private_bytes()
        bare = replace(result, tensors={}, memory={})
        return (bare, to_arrays(result.tensors), to_arrays(result.memory)), private_bytes()

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]  # Ray's
    def look(self) -> Look:
        """Return how far the process is; answered while it works."""
        private = private_bytes()
        above = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - _resident_bytes()
        gpu_peak, gpu_total = _gpu_memory()
        return replace(
            self._look,
            private=private,
            peak=private + max(0, above),
            available=_available(),
            gpu_peak=gpu_peak,
            gpu_total=gpu_total,
        )

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]  # Ray's
    def give_up(self, number: int) -> None:
        """Stop the work of this call, or of an earlier one, at its next microbatch."""
        self._unwanted = number

    def _stepped(self, step: int, steps: int) -> None:
        if self._look.number <= self._unwanted:
            raise GivenUp("nobody waits for this assignment any more")
        self._look = Look(self._look.number, self._look.beats + 1, step, steps)


def private_bytes() -> int:
    """Return how much resident memory is this process' own; 0 where the system does not say.

    Mapped files (base weights) and Ray's store are not in it: they are everybody's. Costs some
    microseconds, which the proportional share of each page (PSS) does not.
    """
    resident, shared = _pages()
    return (resident - shared) * _PAGE


def _resident_bytes() -> int:
    return _pages()[0] * _PAGE


def _pages() -> tuple[int, int]:
    """Return the resident pages, and those of them that others may share."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text("ascii").split()
    except OSError:
        return 0, 0
    return int(resident), int(shared)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    [line] = [line for line in lines if line.startswith("MemAvailable:")] or ["MemAvailable: 0 kB"]
    return int(line.split()[1]) * 1024


def _gpu_memory() -> tuple[int, int]:
    """Return this process' peak on its GPU and what that GPU has; zeros where it uses none.

    What its tensors do not explain (CUDA's context, kernels, and whoever else is on the GPU, which
    is nobody while it has one alone) counts as its own.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    besides = max(0, total - free - torch.cuda.memory_reserved())
    return torch.cuda.max_memory_reserved() + besides, total
