"""Memory and processor time of processes, read from /proc (Linux only)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

_MB = 1e6
_NO_ACTORS = ("ray::IDLE", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PRESENT, _FILE_OR_SHARED, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56  # proc_pid_pagemap(5)


def family(pid: int, without: Iterable[int] = ()) -> list[int]:
    """Return a process and all its descendants, but for those in ``without`` and theirs."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (parent := _stat(int(folder.name))) is not None:
            children.setdefault(int(parent[1]), []).append(int(folder.name))
    found, waiting, left_out = [], [pid], set(without)
    while waiting:
        one = waiting.pop()
        if one not in left_out:
            found.append(one)
            waiting += children.get(one, [])
    return found


def actors(pids: Iterable[int]) -> list[int]:
    """Return those of some processes in which a Ray actor lives: no agents, no idle ones."""
    named = {pid: _name(pid) for pid in pids}
    return [p for p, n in named.items() if n.startswith("ray::") and not n.startswith(_NO_ACTORS)]


def pss(pid: int) -> float:
    """Return a process's proportional set size in MB: shared pages are divided by their users."""
    return _field(f"/proc/{pid}/smaps_rollup", "Pss")


def own(pid: int) -> float:
    """Return the MB of anonymous memory of a process: pages of files and of Ray's store are not."""
    return _field(f"/proc/{pid}/status", "RssAnon")


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that some living processes have used so far, in seconds."""
    fields = [found for pid in pids if (found := _stat(pid)) is not None]
    return _TICK_S * sum(int(f[11]) + int(f[12]) for f in fields)


class Peak:
    """The largest :func:`own` memory that a process was seen to have."""

    def __init__(self, pid: int) -> None:
        self.megabytes = own(pid)

    def note(self, pid: int) -> None:
        """Look now."""
        self.megabytes = max(self.megabytes, own(pid))


@contextmanager
def watched(pid: int, every_s: float = 0.01) -> Iterator[Peak]:
    """Watch a process's own memory meanwhile."""
    peak, over = Peak(pid), threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            peak.note(pid)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


class Meter:
    """Watches a process and all its descendants, those that come and go included.

    Attributes:
        megabytes: the most anonymous memory that they had together since :meth:`lap`.
    """

    def __init__(self, pid: int, every_s: float = 0.5) -> None:
        self.megabytes = 0.0
        self._pid, self._every_s = pid, every_s
        self._used: dict[int, float] = {}
        self._before = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._look()
        self.lap()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def lap(self) -> tuple[float, float]:
        """Return processor seconds and peak megabytes since the last lap, and begin another."""
        self._look()
        total, peak = sum(self._used.values()), self.megabytes
        seconds, self._before, self.megabytes = total - self._before, total, 0.0
        return seconds, peak

    def _look(self) -> None:
        living = family(self._pid)
        for pid in living:  # of a dead one, what was seen last counts on
            self._used[pid] = max(self._used.get(pid, 0.0), processor_seconds([pid]))
        self.megabytes = max(self.megabytes, sum(own(pid) for pid in living))

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            self._look()


def private_bytes(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return how many bytes of ``tensors`` no other process shares, and how many there are.

    Private is a resident page that is neither a file's nor shared memory's, and that no other
    process maps. Tensors on the CPU, of this process; what they have in common counts once.
    """
    size = os.sysconf("SC_PAGE_SIZE")
    pages: set[int] = set()
    total, seen = 0, set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        total += storage.nbytes()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        pages.update(range(start // size, -(-stop // size)))
    private = 0
    with Path("/proc/self/pagemap").open("rb") as file:
        for first, count in _ranges(sorted(pages)):
            file.seek(8 * first)
            flags = np.frombuffer(file.read(8 * count), np.uint64)
            own = (flags & _PRESENT != 0) & (flags & _EXCLUSIVE != 0)
            private += int((own & (flags & _FILE_OR_SHARED == 0)).sum())
    return min(size * private, total), total


def _ranges(pages: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[start], i - start
            start = i


def _stat(pid: int) -> list[str] | None:
    """Return a process's state, parent, ... as proc_pid_stat(5) lists them; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _name(pid: int) -> str:
    """Return what a process calls itself; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def _field(path: str, field: str) -> float:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / _MB if found else 0.0
