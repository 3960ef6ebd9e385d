"""FedSVD's server step and the svd merge: factored, as weft does them, against the dense SVD.

    python benchmarks/aggregation.py [--quick] [--json] [--threads 1] [--size 4096 --adapters 8]

Both sides get the same factors of N adapters of one square layer, [d, 16] and [16, d] in float32,
and return factors of rank 16. The dense side is what the methods' published code does: form the
d x d product and call ``torch.linalg.svd`` on it.

Time: both sides in this process, in turn. Memory: what one call adds to the resident memory of a
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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _figures import Figure, show
from torch import Tensor

from strategies.base import Update
from strategies.fedsvd import FedSVD
from strategies.merges.svd import svd

RANK = 16
Adapters = list[dict[str, Tensor]]
A, B, SCALING = "layer.lora_A.weight", "layer.lora_B.weight", "layer.scaling"


def inputs(size: int, num_adapters: int, *, shared: bool) -> Adapters:
    """Return the adapters; ``shared`` gives all of them one A, as FedSVD's clients have.

    Column j of B is scaled by 0.8^j: a trained adapter's singular values decay, and where those
    next to the cut are equal the best approximation, and so the comparison, is not unique.
    """
    generator = torch.Generator().manual_seed(0)
    decay = 0.8 ** torch.arange(RANK)
    adapters: Adapters = []
    for _ in range(num_adapters):
        a = torch.randn(RANK, size, generator=generator) / math.sqrt(size)
        b = torch.randn(size, RANK, generator=generator) * decay
        a = adapters[0][A] if shared and adapters else a
        adapters.append({A: a, B: b, SCALING: torch.tensor(2.0)})
    return adapters


def fedsvd_factored(adapters: Adapters) -> tuple[Tensor, Tensor]:
    """One round of FedSVD at the server."""
    strategy = FedSVD()
    updates = (Update(f"{n:03}", 1, "", {B: x[B]}, 100) for n, x in enumerate(adapters))
    after = strategy.aggregate(strategy.init(adapters[0]), updates).adapter
    return after[B], after[A]


def fedsvd_dense(adapters: Adapters) -> tuple[Tensor, Tensor]:
    """The same through the dense product."""
    mean = torch.stack([x[B] for x in adapters]).mean(dim=0)
    return split(mean @ adapters[0][A])


def merge_factored(adapters: Adapters) -> tuple[Tensor, Tensor]:
    """The svd merge to the adapters' rank."""
    merged = svd(adapters, [1 / len(adapters)] * len(adapters), rank=RANK)
    return merged[B], merged[A]


def merge_dense(adapters: Adapters) -> tuple[Tensor, Tensor]:
    """The same through the dense sum of products."""
    total = torch.zeros(adapters[0][B].shape[0], adapters[0][A].shape[1])
    for x in adapters:
        total.addmm_(x[B], x[A], alpha=float(x[SCALING]) / len(adapters))
    return split(total)


def split(product: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank-16 factors of a dense product, the right one with orthonormal rows."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return u[:, :RANK] * s[:RANK], vh[:RANK]


Side = Callable[[Adapters], tuple[Tensor, Tensor]]
JOBS: dict[str, tuple[Side, Side]] = {
    "fedsvd": (fedsvd_factored, fedsvd_dense),
    "svd-merge": (merge_factored, merge_dense),
}


def timed(side: Side, adapters: Adapters) -> tuple[float, tuple[Tensor, Tensor]]:
    """Return the seconds one call took, and its result."""
    start = time.perf_counter()
    result = side(adapters)
    return time.perf_counter() - start, result


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the largest entry of the difference of two products over the largest of the second.

    In blocks of rows: the comparison itself needs no d x d memory.
    """
    difference = largest = 0.0
    for x, y in zip(left[0].split(256), right[0].split(256), strict=True):
        ours, theirs = x.double() @ left[1].double(), y.double() @ right[1].double()
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
    return difference / largest


def peak_memory(job: str, side: int, size: int, num_adapters: int) -> float:
    """Return the MB that one call adds to the peak of a fresh process."""
    arguments = [job, str(side), str(size), str(num_adapters)]
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, *threads, "--memory-of", *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout)


def added_memory(job: str, side: int, size: int, num_adapters: int) -> float:
    """Return the MB that one call adds to the peak of this process."""
    call = JOBS[job][side]
    call(inputs(64, num_adapters, shared=job == "fedsvd"))  # loads the libraries
    adapters = inputs(size, num_adapters, shared=job == "fedsvd")
    before = process_memory("VmRSS")
    call(adapters)
    return max(0.0, process_memory("VmHWM") - before)


def process_memory(field: str) -> float:
    """Return a field of this process's status in MB: ``VmRSS`` now, ``VmHWM`` at its peak.

    Not ``resource.getrusage``: its peak is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 1024


def compare(job: str, size: int, num_adapters: int) -> list[Figure]:
    """Return the figures of one job at one size."""
    factored, dense = JOBS[job]
    adapters = inputs(size, num_adapters, shared=job == "fedsvd")
    for side in (factored, dense):
        side(inputs(64, num_adapters, shared=job == "fedsvd"))
    # Each of four dense SVDs at d = 4096 takes half a minute and more: three runs have to do.
    dense_runs = 5 if size <= 2048 else 3
    ours, theirs = [], []
    for turn in range(5):
        seconds, mine = timed(factored, adapters)
        ours.append(seconds)
        if turn < dense_runs:
            seconds, peer = timed(dense, adapters)
            theirs.append(seconds)
    memory = [peak_memory(job, side, size, num_adapters) for side in (0, 1)]

    milliseconds = [1e3 * statistics.median(times) for times in (ours, theirs)]
    spread = f"factored {span(ours)} of {len(ours)}, dense {span(theirs)} of {len(theirs)}"
    where = f"d={size} N={num_adapters} r={RANK} float32 threads={torch.get_num_threads()}"
    goal = 500.0 if (size, num_adapters) == (4096, 8) else None
    name, peer_name = f"aggregation.{job}", "dense torch.linalg.svd"
    rows = [
        ("time", milliseconds[0], "ms", None, "lower", ""),
        ("dense-time", milliseconds[1], "ms", None, "lower", ""),
        ("speedup", milliseconds[1] / milliseconds[0], "x", goal, "higher", f"; {spread}"),
        ("memory", memory[0], "MB", None, "lower", ""),
        ("dense-memory", memory[1], "MB", None, "lower", ""),
        ("memory-ratio", memory[1] / max(memory[0], 1.0), "x", None, "higher", "; ours >= 1 MB"),
        ("difference", largest_difference(mine, peer), "relative", 1e-3, "lower", "; largest"),
    ]
    return [
        Figure(f"{name}.{row}", value, unit, aim, better, peer_name, where + note)
        for row, value, unit, aim, better, note in rows
    ]


def span(seconds: Sequence[float]) -> str:
    """Return the smallest and largest of some times, in ms."""
    return f"{1e3 * min(seconds):.3g}..{1e3 * max(seconds):.3g} ms"


def growth(figures: Sequence[Figure], sizes: Sequence[int], num_adapters: int) -> list[Figure]:
    """Return how memory grows with d in the svd merge: the exponent, 1 for d and 2 for d²."""
    low, high = sizes[0], sizes[-1]
    result = []
    for row, goal in (("memory", 1.25), ("dense-memory", None)):
        at = [
            max(f.value, 1e-3)
            for size in (low, high)
            for f in figures
            if f.name == f"aggregation.svd-merge.{row}"
            and f.setting.startswith(f"d={size} N={num_adapters} ")
        ]
        exponent = math.log(at[1] / at[0]) / math.log(high / low)
        name = f"aggregation.svd-merge.{row}-exponent"
        setting = f"d={low}..{high} N={num_adapters} r={RANK} float32"
        result.append(Figure(name, exponent, "power of d", goal, "lower", "", setting))
    return result


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="d = 512 and 1024, N = 8")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--size", type=int, action="append", help="only this d (repeatable)")
    parser.add_argument("--adapters", type=int, action="append", help="only this N (repeatable)")
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        job, *numbers = arguments.memory_of
        print(added_memory(job, *map(int, numbers)))
        return

    sizes = sorted(arguments.size or ([512, 1024] if arguments.quick else [1024, 2048, 4096]))
    counts = sorted(arguments.adapters or ([8] if arguments.quick else [8, 32]))
    figures = [f for d in sizes for n in counts for job in JOBS for f in compare(job, d, n)]
    if len(sizes) > 1:
        figures += [f for n in counts for f in growth(figures, sizes, n)]
    show("aggregation", figures, arguments.json)


if __name__ == "__main__":
    main()
