"""What a private step costs: weft's engines beside the step without privacy and plain Opacus.

    python benchmarks/dp_speed.py [--quick] [--json] [--point 32x64x8 ...] [--turns 7]

All sides take whole steps (gradient, clip, noise, SGD) of one model, an encoder of 6 layers and
width 384 with random weights, LoRA on query and value and a head of three labels, on the same batch
of random tokens. The peers are ``PrivacyEngine.make_private`` of Opacus on a copy of the model,
with its hooks and with its ghost clipping. weft's noise comes from its cryptographic stream,
Opacus' from torch's generator.

Time is processor time with one thread, which a busy machine disturbs less than the clock; sides
take turns in one process. Memory is what steps add to the resident memory of a fresh process at its
peak (VmHWM - VmRSS of /proc, so Linux only), after the model was made and another took a step of
two short examples.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, show
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.gradients import PrivateGradient, plain_step
from clients.noise import NoiseStream, insecure_key
from clients.task_model import TaskModel

WIDTH, LAYERS, LABELS = 384, 6, ("x", "y", "z")
VOCABULARY = 1000  # the table is frozen and looked up: its size is neither time nor added memory
SPEC = ModelSpec("", "classification", labels=LABELS)
CLIP, SIGMA, RATE = 1.0, 1.0, 1e-3

Step = Callable[[], None]
Point = tuple[int, int, int]  # batch, length, rank


def task_model(rank: int) -> TaskModel:
    """Return the model, with what trains float32 and requiring gradients."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    backbone = BertModel(config, add_pooling_layer=False).requires_grad_(False)
    adapter = ADAPTERS.get("lora").build(r=rank, target_modules=["query", "value"])
    return TaskModel(adapter.attach(backbone, {}), SPEC).train()


def examples(batch: int, length: int) -> Batch:
    """Return random tokens and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    labels = torch.randint(0, len(LABELS), (batch,), generator=generator)
    return Batch(ids, torch.ones_like(ids), labels)


def plain(model: TaskModel, batch: Batch) -> Step:
    """Return a step without privacy."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(params.values(), lr=RATE)

    def step() -> None:
        plain_step(params, [batch], lambda b: model.example_losses(model(b), b), len(batch))
        optimizer.step()

    return step


def private(model: TaskModel, batch: Batch, open_until: ExitStack, by: str = "taps") -> Step:
    """Return a step of weft's DP-SGD, measured by one of its engines."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(params.values(), lr=RATE)
    stream = NoiseStream(insecure_key(0, "clinic"), "digest")
    engine = PrivateGradient(model, params, CLIP, SIGMA, float(len(batch)), stream, engine=by)
    open_until.enter_context(engine)
    numbers = count()

    def step() -> None:
        engine.step([batch], lambda b: model.example_losses(model(b), b), next(numbers))
        optimizer.step()

    return step


def opacus(model: TaskModel, batch: Batch, mode: str) -> Step:
    """Return a step of plain Opacus."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    trained = [p for p in model.parameters() if p.requires_grad]
    loader = DataLoader(TensorDataset(batch.input_ids), batch_size=len(batch))
    ghost = {"criterion": torch.nn.CrossEntropyLoss()} if mode == "ghost" else {}
    made: Any = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=RATE),
        data_loader=loader,
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **ghost,
    )
    module, optimizer = made[0], made[1]
    criterion: Callable[[Tensor, Tensor], Any] = made[2] if ghost else functional.cross_entropy

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(batch), batch.labels).backward()
        optimizer.step()

    return step


SIDES = ("plain", "weft", "weft-hooks", "opacus", "opacus-ghost")
WEIGHED = ("plain", "weft", "opacus")  # whose memory is measured, each in a process of its own


def side(name: str, model: TaskModel, batch: Batch, open_until: ExitStack) -> Step:
    """Return a step of one side, named."""
    if name == "plain":
        return plain(model, batch)
    if name == "weft":
        return private(model, batch, open_until)
    if name.startswith("weft-"):
        return private(model, batch, open_until, name.removeprefix("weft-"))
    return opacus(model, batch, "ghost" if name.endswith("ghost") else "hooks")


def seconds(point: Point, turns: int) -> dict[str, list[float]]:
    """Return the processor seconds of every side's steps; the sides' order changes every turn."""
    batch, length, rank = point
    with ExitStack() as stack:
        steps = {n: side(n, task_model(rank), examples(batch, length), stack) for n in SIDES}
        for step in steps.values():
            step()
        found: dict[str, list[float]] = {name: [] for name in SIDES}
        for turn in range(turns):
            for name in SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]:
                start = time.process_time()
                steps[name]()
                found[name].append(time.process_time() - start)
    return found


def peak_memory(name: str, point: Point) -> float:
    """Return the MB that a side's steps add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, *map(str, point)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout)


def added_memory(name: str, point: Point) -> float:
    """Return the MB that a side's steps add to the peak of this process."""
    batch, length, rank = point
    with ExitStack() as stack:
        model = task_model(rank)
        step = side(name, model, examples(batch, length), stack)
        with ExitStack() as short:
            side(name, task_model(rank), examples(2, 8), short)()  # loads the libraries
        gc.collect()  # the other model is a reference cycle
        ctypes.CDLL(None).malloc_trim(0)
        before = process_memory("VmRSS")
        step()
        step()
        return process_memory("VmHWM") - before


def process_memory(field: str) -> float:
    """Return a field of this process's status in MB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 1024


def compare(point: Point, turns: int) -> list[Figure]:
    """Return the figures of one point of the grid."""
    took = seconds(point, turns)
    memory = {name: peak_memory(name, point) for name in WEIGHED}
    where = f"batch={point[0]} length={point[1]} r={point[2]} float32 threads=1"
    rows = []
    for name in SIDES:
        times, spread = took[name], f"{1e3 * min(took[name]):.0f}..{1e3 * max(took[name]):.0f} ms"
        rows.append((f"{name}.time", 1e3 * statistics.median(times), "ms", None, spread))
    for name, goal in (("weft", 1.05), ("weft-hooks", 1.5), ("opacus", None)):
        rows.append((f"{name}.time-ratio", ratio(took, name, "plain"), "x", goal, "to plain"))
    rows.append(("weft.time-to-opacus", ratio(took, "weft", "opacus"), "x", 1.0, "to its hooks"))
    for name, added in memory.items():
        rows.append((f"{name}.memory", added, "MB", None, ""))
    for name, goal in (("weft", 1.1), ("opacus", None)):
        of_plain = memory[name] / max(memory["plain"], 1.0)
        rows.append((f"{name}.memory-ratio", of_plain, "x", goal, "to plain"))
    return [
        Figure(f"dp-speed.{name}", value, unit, goal, "lower", "opacus", f"{where}; {note}")
        for name, value, unit, goal, note in rows
    ]


def ratio(took: dict[str, list[float]], name: str, other: str) -> float:
    """Return one side's median time over another's; turns of one are as far apart as of both."""
    return statistics.median(took[name]) / statistics.median(took[other])


def parsed(text: str) -> Point:
    """Return a point from ``BATCHxLENGTHxRANK``."""
    batch, length, rank = map(int, text.split("x"))
    return batch, length, rank


GRID = [(b, t, r) for b in (8, 32) for t in (16, 64, 128) for r in (8,)] + [(32, 64, 64)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small point of the grid")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--point", type=parsed, action="append", help="BATCHxLENGTHxRANK")
    parser.add_argument("--turns", type=int, default=7, help="steps of each side")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of Opacus' about its own generator, and torch's hooks
    if given.memory_of:
        name, *numbers = given.memory_of
        batch, length, rank = map(int, numbers)
        print(added_memory(name, (batch, length, rank)))
        return
    points = given.point or ([(8, 64, 8)] if given.quick else GRID)
    turns = 5 if given.quick else given.turns
    for point in points:  # one after the other: each takes minutes on a busy machine
        show(f"dp-speed {'x'.join(map(str, point))}", compare(point, turns), given.json)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
