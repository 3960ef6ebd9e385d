"""What a private step costs: weft's engines beside the step without privacy and plain Opacus.

    python benchmarks/dp_speed.py [--quick] [--json] [--point 32x64x8 ...] [--turns 7]

All sides take whole steps (gradient, clip, noise, SGD) of one model of 6 layers and width 384 with
random weights and adapters on query and value, on the same batch of random tokens: an encoder with
a head of three labels, or with ``--point 32x64x8:lora:causal`` a decoder that predicts the next
token. The peers are ``PrivacyEngine.make_private`` of Opacus on a copy of the model, with its hooks
and with its ghost clipping. weft's noise comes from its cryptographic stream, Opacus' from torch's
generator. Opacus cannot train other adapters than LoRA: with ``:dora`` (or another) the sides are
weft's engine for it, and microbatches of one.

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
from typing import Any, NamedTuple

import torch
from _figures import Figure, show
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.gradients import PrivateGradient, plain_step
from clients.noise import NoiseStream, insecure_key
from clients.per_example import engines_of
from clients.task_model import TaskModel

WIDTH, LAYERS, LABELS = 384, 6, ("x", "y", "z")
VOCABULARY = 1000  # the table is frozen and looked up: its size is neither time nor added memory
SPECS = {
    "encoder": ModelSpec("", "classification", labels=LABELS),
    "causal": ModelSpec("", "causal-lm"),
}
CLIP, SIGMA, RATE = 1.0, 1.0, 1e-3

Step = Callable[[], None]


class Point(NamedTuple):
    """A point of the grid."""

    batch: int
    length: int
    rank: int
    adapter: str = "lora"
    kind: str = "encoder"


def task_model(point: Point) -> TaskModel:
    """Return the model, with what trains float32 and requiring gradients."""
    torch.manual_seed(0)
    causal = point.kind == "causal"
    backbone = (decoder() if causal else encoder()).requires_grad_(False)
    targets = ["q_proj", "v_proj"] if causal else ["query", "value"]
    adapter = ADAPTERS.get(point.adapter).build(r=point.rank, target_modules=targets)
    return TaskModel(adapter.attach(backbone, {}), SPECS[point.kind]).train()


def encoder() -> Any:
    """Return a BERT without weights of anyone's."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def decoder() -> Any:
    """Return a Llama without weights of anyone's."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def examples(point: Point, batch: int, length: int) -> Batch:
    """Return random tokens and what is to be learned of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    labels = torch.randint(0, len(LABELS), (batch,), generator=generator)
    return Batch(ids, torch.ones_like(ids), ids if point.kind == "causal" else labels)


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

    def step() -> None:
        optimizer.zero_grad()
        outputs = module(batch)
        loss = made[2](outputs, batch.labels) if ghost else None
        (loss or model.example_losses(outputs, batch).mean()).backward()
        optimizer.step()

    return step


WEIGHED = ("plain", "weft", "opacus")  # whose memory is measured, each in a process of its own


def sides_of(point: Point) -> tuple[str, ...]:
    """Return the sides that a point has."""
    if point.adapter != "lora":
        return ("plain", "weft", "weft-alone")
    sides = ("plain", "weft", "weft-hooks", "opacus")
    return sides if point.kind == "causal" else (*sides, "opacus-ghost")


def side(name: str, point: Point, batch: Batch, open_until: ExitStack) -> Step:
    """Return a step of one side, named, of a model of its own."""
    model = task_model(point)
    if name == "plain":
        return plain(model, batch)
    if name == "weft":
        engines = engines_of(ADAPTERS.get(point.adapter).build().capabilities)
        return private(model, batch, open_until, engines[0])
    if name.startswith("weft-"):
        return private(model, batch, open_until, name.removeprefix("weft-"))
    return opacus(model, batch, "ghost" if name.endswith("ghost") else "hooks")


def seconds(point: Point, turns: int) -> dict[str, list[float]]:
    """Return the processor seconds of every side's steps; the sides' order changes every turn."""
    sides, batch = sides_of(point), examples(point, point.batch, point.length)
    with ExitStack() as stack:
        steps = {n: side(n, point, batch, stack) for n in sides}
        for step in steps.values():
            step()
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                start = time.process_time()
                steps[name]()
                found[name].append(time.process_time() - start)
    return found


def peak_memory(name: str, point: Point) -> float:
    """Return the MB that a side's steps add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, written(point)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout)


def added_memory(name: str, point: Point) -> float:
    """Return the MB that a side's steps add to the peak of this process."""
    with ExitStack() as stack:
        step = side(name, point, examples(point, point.batch, point.length), stack)
        with ExitStack() as short:
            side(name, point, examples(point, 2, 8), short)()  # loads the libraries
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
    lora = point.adapter == "lora"
    weighed = [name for name in WEIGHED if name in took]
    memory = {name: peak_memory(name, point) for name in weighed}
    where = (
        f"batch={point.batch} length={point.length} r={point.rank} {point.adapter} {point.kind} "
        "float32 threads=1"
    )
    rows: list[tuple[str, float, str, float | None, str]] = []
    for name, times in took.items():
        spread = f"{1e3 * min(times):.0f}..{1e3 * max(times):.0f} ms"
        rows.append((f"{name}.time", 1e3 * statistics.median(times), "ms", None, spread))
    goals = {"weft": 1.05 if lora else 1.5, "weft-hooks": 1.5}
    for name in took.keys() - {"plain", "opacus-ghost"}:
        against = ratio(took, name, "plain")
        rows.append((f"{name}.time-ratio", against, "x", goals.get(name), "to plain"))
    if lora:
        against = ratio(took, "weft", "opacus")
        rows.append(("weft.time-to-opacus", against, "x", 1.0, "to its hooks"))
    for name, added in memory.items():
        rows.append((f"{name}.memory", added, "MB", None, ""))
    for name in weighed[1:]:
        of_plain, goal = memory[name] / max(memory["plain"], 1.0), 1.1 if name == "weft" else None
        rows.append((f"{name}.memory-ratio", of_plain, "x", goal, "to plain"))
    return [
        Figure(f"dp-speed.{name}", value, unit, goal, "lower", "opacus", f"{where}; {note}")
        for name, value, unit, goal, note in rows
    ]


def ratio(took: dict[str, list[float]], name: str, other: str) -> float:
    """Return one side's median time over another's; turns of one are as far apart as of both."""
    return statistics.median(took[name]) / statistics.median(took[other])


def parsed(text: str) -> Point:
    """Return a point from ``BATCHxLENGTHxRANK[:ADAPTER[:KIND]]``."""
    size, *names = text.split(":")
    batch, length, rank = map(int, size.split("x"))
    return Point(batch, length, rank, *names)


def written(point: Point) -> str:
    """Return what :func:`parsed` reads as a point."""
    return f"{point.batch}x{point.length}x{point.rank}:{point.adapter}:{point.kind}"


QUICK = [Point(8, 64, 8)]
GRID = [Point(b, t, 8) for b in (8, 32) for t in (16, 64, 128)] + [
    Point(32, 64, 64),
    Point(32, 64, 8, "dora"),
    Point(32, 64, 8, "lora", "causal"),
    Point(32, 64, 8, "dora", "causal"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small point of the grid")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--point", type=parsed, action="append", help="BATCHxLENGTHxRANK[:ADAPTER[:encoder|causal]]"
    )
    parser.add_argument("--turns", type=int, default=7, help="steps of each side")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of Opacus' about its own generator, and torch's hooks
    if given.memory_of:
        name, point = given.memory_of
        print(added_memory(name, parsed(point)))
        return
    points = given.point or (QUICK if given.quick else GRID)
    turns = 5 if given.quick else given.turns
    for point in points:  # one after the other: each takes minutes on a busy machine
        show(f"dp-speed {written(point)}", compare(point, turns), given.json)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
