"""What the server computes in a round: exact strategies beside their dense forms, means, merges.

    python benchmarks/aggregation.py [--quick] [--json] [--threads 1] [--size 4096 --adapters 8]

*Exact strategies and the svd merge.* Both sides get the same factors of N adapters of one square
layer, [d, r] and [r, d] in float32. The dense side is what the methods' published code does: form
the d x d products and their mean, and call ``torch.linalg.svd`` on it where the method splits it.

*Averaging.* See ``_averaging.py``: FedAvg's mean beside a copy of the same bytes and Flower's.

Time: both sides in this process, in turn; with ``--threads 1`` the processor's, which other
processes do not lengthen by waiting. Memory: what one call adds to the resident memory of a
fresh process at its peak (VmHWM - VmRSS of /proc, so Linux only), after the inputs are made and the
function was called once on a small layer; it counts what LAPACK takes beside torch's allocator too.
Figures below 1 MB are noise.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _averaging import clock, measure
from _figures import Figure, show
from _rounds import (
    SCALING,
    SPLITTING,
    A,
    B,
    Product,
    Round,
    exact,
    inputs,
    largest_difference,
    product,
    split,
)
from torch import Tensor

from strategies.merges.svd import svd

MERGE = "svd-merge"
IN_MEMORY = ("fedsvd", MERGE)
"""Of which the memory is measured too: it takes a process for each side."""


class Sides(NamedTuple):
    """One computation in two ways, and the product that a result of the first is."""

    factored: Callable[[], Any]
    dense: Callable[[], Tensor | Product]
    product: Callable[[Any], Product]


def sides(job: str, size: int, num_adapters: int, rank: int) -> Sides:
    """Return both sides of a job, with their inputs."""
    if job != MERGE:
        one = Round.of(job, size, num_adapters, rank)
        return Sides(one.factored, one.dense, product)
    adapters = inputs(size, num_adapters, rank)

    def factored() -> Product:
        merged = svd(adapters, [1 / num_adapters] * num_adapters, rank=rank)
        return merged[B], merged[A]

    def dense() -> Product:
        total = torch.zeros(size, size)
        for x in adapters:
            total.addmm_(x[B], x[A], alpha=float(x[SCALING]) / num_adapters)
        return split(total, rank)

    return Sides(factored, dense, lambda result: result)


def timed(side: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds one call took, and its result."""
    start = clock()
    result = side()
    return clock() - start, result


def peak_memory(job: str, side: int, size: int, num_adapters: int, rank: int) -> float:
    """Return the MB that one call adds to the peak of a fresh process."""
    arguments = [job, str(side), str(size), str(num_adapters), str(rank)]
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, *threads, "--memory-of", *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout)


def added_memory(job: str, side: int, size: int, num_adapters: int, rank: int) -> float:
    """Return the MB that one call adds to the peak of this process."""
    sides(job, 64, num_adapters, rank)[side]()  # loads the libraries
    call = sides(job, size, num_adapters, rank)[side]
    before = process_memory("VmRSS")
    call()
    return max(0.0, process_memory("VmHWM") - before)


def process_memory(field: str) -> float:
    """Return a field of this process's status in MB: ``VmRSS`` now, ``VmHWM`` at its peak.

    Not ``resource.getrusage``: its peak is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 1024


def compare(job: str, size: int, num_adapters: int, rank: int) -> list[Figure]:
    """Return the figures of one job at one size."""
    for side in sides(job, 64, num_adapters, rank)[:2]:
        side()
    factored, dense, whole = sides(job, size, num_adapters, rank)
    decomposes = job in (*SPLITTING, MERGE)
    # Each of four dense SVDs at d = 4096 takes half a minute and more: three runs have to do.
    dense_runs = 3 if decomposes and size > 2048 else 5
    ours, theirs = [], []
    for turn in range(5):
        seconds, mine = timed(factored)
        ours.append(seconds)
        if turn < dense_runs:
            seconds, peer = timed(dense)
            theirs.append(seconds)

    milliseconds = [1e3 * statistics.median(times) for times in (ours, theirs)]
    spread = f"factored {span(ours)} of {len(ours)}, dense {span(theirs)} of {len(theirs)}"
    where = f"d={size} N={num_adapters} r={rank} float32 threads={torch.get_num_threads()}"
    goal = 500.0 if decomposes and (size, num_adapters) == (4096, 8) else None
    difference = largest_difference(whole(mine), peer)
    rows = [
        ("time", milliseconds[0], "ms", None, "lower", ""),
        ("dense-time", milliseconds[1], "ms", None, "lower", ""),
        ("speedup", milliseconds[1] / milliseconds[0], "x", goal, "higher", f"; {spread}"),
        ("difference", difference, "relative", 1e-3, "lower", "; largest"),
    ]
    if job in IN_MEMORY:
        memory = [peak_memory(job, side, size, num_adapters, rank) for side in (0, 1)]
        ratio = memory[1] / max(memory[0], 1.0)
        rows += [
            ("memory", memory[0], "MB", None, "lower", ""),
            ("dense-memory", memory[1], "MB", None, "lower", ""),
            ("memory-ratio", ratio, "x", None, "higher", "; ours >= 1 MB"),
        ]
    peer_name = "dense torch.linalg.svd" if decomposes else "the mean of dense products"
    return [
        Figure(f"aggregation.{job}.{row}", value, unit, aim, better, peer_name, where + note)
        for row, value, unit, aim, better, note in rows
    ]


def span(seconds: Sequence[float]) -> str:
    """Return the smallest and largest of some times, in ms."""
    return f"{1e3 * min(seconds):.3g}..{1e3 * max(seconds):.3g} ms"


def growth(
    figures: Sequence[Figure], sizes: Sequence[int], num_adapters: int, rank: int
) -> list[Figure]:
    """Return how memory grows with d in the svd merge: the exponent, 1 for d and 2 for d²."""
    low, high = sizes[0], sizes[-1]
    result = []
    for row, goal in (("memory", 1.25), ("dense-memory", None)):
        at = [
            max(f.value, 1e-3)
            for size in (low, high)
            for f in figures
            if f.name == f"aggregation.{MERGE}.{row}"
            and f.setting.startswith(f"d={size} N={num_adapters} r={rank} ")
        ]
        exponent = math.log(at[1] / at[0]) / math.log(high / low)
        name = f"aggregation.{MERGE}.{row}-exponent"
        setting = f"d={low}..{high} N={num_adapters} r={rank} float32"
        result.append(Figure(name, exponent, "power of d", goal, "lower", "", setting))
    return result


def main() -> None:
    """Measure, and print a table or JSON lines."""
    jobs = [*exact(), MERGE]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="d = 512 and 1024, N = 8, r = 16")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--size", type=int, action="append", help="only this d (repeatable)")
    parser.add_argument("--adapters", type=int, action="append", help="only this N (repeatable)")
    parser.add_argument("--rank", type=int, action="append", help="only this r (repeatable)")
    parser.add_argument(
        "--only", action="append", choices=["averaging", *jobs], help="only this (repeatable)"
    )
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        job, *numbers = arguments.memory_of
        print(added_memory(job, *map(int, numbers)))
        return

    sizes = sorted(arguments.size or ([512, 1024] if arguments.quick else [1024, 4096]))
    counts = sorted(arguments.adapters or ([8] if arguments.quick else [8, 32]))
    ranks = sorted(arguments.rank or ([16] if arguments.quick else [8, 16]))
    wanted = arguments.only or ["averaging", *jobs]
    at = [(d, n, r) for d in sizes for n in counts for r in ranks]
    figures = [
        figure
        for place in at
        for job in jobs
        if job in wanted and (job in IN_MEMORY or not arguments.quick or place[0] == sizes[0])
        for figure in compare(job, *place)
    ]
    if len(sizes) > 1 and MERGE in wanted:
        figures += [f for n in counts for r in ranks for f in growth(figures, sizes, n, r)]
    if "averaging" in wanted:
        places = [(4096, 8, 16)] if arguments.quick else at
        figures += [f for place in places for f in measure(*place, quick=arguments.quick)]
    show("aggregation", figures, arguments.json)


if __name__ == "__main__":
    main()
