"""What ``continual.py`` compares: methods, sequences of tasks, and the streams they make.

A *cell* is a sequence of tasks, dealt to one client or several. Everything here is a function of
the plan alone: the same plan makes the same streams, so that what there is of them is found again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from _continual_data import TaskData

from storage.canonical import canonical_json

LORA = {"name": "lora", "r": 8, "alpha": 16}
"""Of query and value: 73,728 trained numbers in MiniLM, which the others below have as well."""
FROZEN_A = {"name": "lora", "r": 16, "alpha": 32}
CORES = {"name": "lora-sb", "r": 78, "alpha": 156}
CUR = {"name": "curlora", "r": 78}
"""Cores of 78 x 78: 73,008 numbers."""
RATES = (1e-3, 3e-3, 8e-3, 2e-2)
B_RATES = (3e-3, 8e-3, 2e-2, 5e-2)
CORE_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
CUR_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""A step of AdamW moves each of rank² numbers alike, so that the higher the rank, the lower."""
SGD_RATES = (1e-1, 3e-1, 1.0, 3.0)
TUNING_SEED = 100
"""No reported stream has it."""
DOMAINS = (
    "banking",
    "credit_cards",
    "kitchen_and_dining",
    "home",
    "auto_and_commute",
    "travel",
    "utility",
    "work",
    "small_talk",
    "meta",
)
"""The parts of CLINC150."""

Choice = tuple[float, float | None]
"""A learning rate, and the weight of a method's penalty where it has one that is tuned."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to learn task after task.

    Attributes:
        name: as it is printed, and in its streams' names.
        about: in a few words, how it is set.
        how: a stream's ``method``, without the optimizer.
        rates: learning rates of which one is chosen.
        weights: of its first regularizer, of which one is chosen along with the rate; empty where
            that has no weight.
        optimizer: the clients'.
        first: what its first task sets, which has nothing from before.
        routed: whether each task's adapter is also chosen by a router.
    """

    name: str
    about: str
    how: Mapping[str, Any]
    rates: tuple[float, ...] = RATES
    weights: tuple[float, ...] = ()
    optimizer: str = "adamw"
    first: Mapping[str, Any] = field(default_factory=dict)
    routed: bool = False

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Return what is tried: four of each, as many for every method."""
        return tuple(product(self.rates, self.weights or (None,)))

    def document(self, choice: Choice) -> dict[str, Any]:
        """Return what a stream's file says of its method."""
        rate, weight = choice
        said: dict[str, Any] = {**self.how, "optimizer": {"name": self.optimizer, "lr": rate}}
        if weight is not None:
            first, *others = said["regularizers"]
            said["regularizers"] = [{**first, "weight": weight}, *others]
        return said


def _plain(name: str, about: str, start: str = "continue", **more: Any) -> Method:
    routed = more.pop("routed", False)
    return Method(name, about, {"start": start, "adapter": LORA, **more}, routed=routed)


def _held(name: str, weights: tuple[float, ...]) -> Method:
    """Return what holds entries to their values: with A frozen they mean the same throughout."""
    how = {"adapter": FROZEN_A, "strategy": "ffa-lora", "regularizers": [{"name": name}]}
    return Method(name, "A frozen", how, B_RATES[:2], weights)


def _kept(name: str, about: str, weights: tuple[float, ...] = (), **options: Any) -> Method:
    how = {"adapter": LORA, "regularizers": [{"name": name, **options}]}
    rates = (3e-3, 8e-3) if weights else RATES
    return Method(name, about, how, rates, weights)


CONTROLS: tuple[Method, ...] = (
    _plain("sequential", "one LoRA trained on: the control"),
    _plain("joint", "all tasks at once: the ceiling", "joint"),
    _plain("isolated", "an adapter a task", "isolated", routed=True),
)
METHODS: tuple[Method, ...] = (
    Method(
        "o-lora-hard",
        "A frozen outside of earlier ones",
        {
            "adapter": FROZEN_A,
            "strategy": "ffa-lora",
            "regularizers": [{"name": "o-lora", "form": "hard"}],
        },
        B_RATES,
    ),
    _kept("replay", "200 texts kept, 8 a step", size=200, batch=8),
    _kept("lwf", "the task's start is the teacher", (1.0, 4.0)),
    Method("curlora", "cores of CUR", {"adapter": CUR, "strategy": "fed-sb"}, CUR_RATES),
    _held("ewc", (1e3, 1e5)),
    Method(
        "inflora",
        "A frozen, made of inputs",
        {"adapter": FROZEN_A, "strategy": "ffa-lora", "regularizers": ["inflora"]},
        B_RATES,
    ),
    _kept("der-plus-plus", "200 texts and logits kept, 8 a step", size=200, batch=8),
    Method(
        "lori",
        "a tenth of B a task",
        {
            "start": "stack",
            "library": True,
            "adapter": FROZEN_A,
            "strategy": {"name": "lori", "sparsity": 0.9},
        },
        B_RATES,
    ),
    Method(
        "o-lora-soft",
        "overlap of A penalised",
        {"adapter": LORA, "regularizers": [{"name": "o-lora", "form": "soft"}]},
        (3e-3, 8e-3),
        (0.5, 5.0),
    ),
    Method(
        "eigenlorax",
        "cores in the tasks' subspace",
        {
            "start": "fresh",
            "library": True,
            "adapter": CORES,
            "strategy": {"name": "eigenlorax", "random": 8},
        },
        CORE_RATES,
        first={"strategy": "fed-sb"},
    ),
    _plain("magmax", "largest changes, rank 32", merge={"name": "magmax", "rank": 32}),
    Method(
        "sd-lora",
        "directions frozen",
        {"adapter": {**LORA, "name": "sd-lora"}, "strategy": "sd-lora"},
    ),
    Method(
        "gpm",
        "gradients projected",
        {"adapter": LORA, "regularizers": ["gpm"]},
        SGD_RATES,
        optimizer="sgd",
    ),
    _kept("n-lora", "L1 of the product", (1e-6, 1e-5)),
    _held("si", (1.0, 100.0)),
    _held("mas", (1.0, 100.0)),
    _kept("l2-sp", "near the task's start", (1e-2, 1.0)),
    Method(
        "frozen-a",
        "the control of those with A frozen",
        {"start": "continue", "adapter": FROZEN_A, "strategy": "ffa-lora"},
        B_RATES,
    ),
    _plain("stacked", "the control of those that stack", "stack"),
)
"""In the order in which they are run: what differs most comes first."""
NAMED = ("o-lora-hard", "replay", "lwf", "curlora", "ewc", "inflora", "lori")
"""The subset that the default plan also has on other sequences and on eight clients."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A sequence of tasks, and how each is trained on.

    Attributes:
        name: in its streams' names.
        title: as it is printed.
        tasks: the parts of each task.
        shuffled: whether a seed decides the order, too.
        clients: among which a task's rows are dealt; several get unlike ones, by Dirichlet's 0.5.
        rounds: a task.
        steps: of each client a round.
        max_length: of a text in tokens.
    """

    name: str
    title: str
    tasks: tuple[tuple[str, ...], ...]
    shuffled: bool = False
    clients: int = 1
    rounds: int = 2
    steps: int = 24
    max_length: int = 32

    def order(self, seed: int) -> tuple[tuple[str, ...], ...]:
        """Return the tasks in a seed's order."""
        tasks = list(self.tasks)
        if self.shuffled and seed:
            random.Random(seed).shuffle(tasks)
        return tuple(tasks)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the plan: a cell's streams of some methods with some seeds."""

    cell: Cell
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, in the order in which it is run.

    Attributes:
        parts: one after the other; a cell may come again with other seeds.
        tuning: the cell that rates are chosen in, each once for all cells.
        batch_size: texts a step.
        model: the base model.
        compute_dtype: of the base model.
        device: where clients train.
        train: rows of a data set at most, where a whole one is a task.
        test: likewise.
    """

    parts: tuple[Part, ...]
    tuning: Cell
    batch_size: int = 16
    model: str = "builtin:minilm"
    compute_dtype: str = "bf16"
    device: str = "cpu"
    train: int = 1000
    test: int = 400

    @property
    def methods(self) -> tuple[Method, ...]:
        """Return all methods, in order."""
        return tuple({m.name: m for part in self.parts for m in part.methods}.values())

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Return all cells, in order."""
        return tuple({part.cell.name: part.cell for part in self.parts}.values())

    def streams(self) -> Iterator[tuple[Cell, int, Method]]:
        """Yield what is run after what."""
        for part in self.parts:
            for seed in part.seeds:
                for method in part.methods:
                    yield part.cell, seed, method

    def document(
        self, cell: Cell, seed: int, method: Method, choice: Choice, tasks: Sequence[TaskData]
    ) -> dict[str, Any]:
        """Return a stream's file; its name follows from all else in it."""
        dealt: dict[str, Any] = {"by": "iid", "parts": 1}
        if cell.clients > 1:
            dealt = {"by": "dirichlet", "alpha": 0.5, "parts": cell.clients}
        base = {
            "seed": seed,
            "model": {
                "id": self.model,
                "max_length": cell.max_length,
                "compute_dtype": self.compute_dtype,
            },
            "strategy": "fedavg",
            "clients": {"simulate": {**dealt, "seed": seed, "public": True}},
            "rounds": cell.rounds,
            "steps": cell.steps,
            "batch_size": self.batch_size,
            "backend": "inline",
            "device": self.device,
        }
        listed = [_task(one, method, number) for number, one in enumerate(tasks)]
        document = {"base": base, "method": method.document(choice), "tasks": listed}
        return named(f"{cell.name}-{method.name}-s{seed}", document)


def named(begins: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stream's file with a name that follows from all else in it."""
    digest = hashlib.sha256(canonical_json(document, "a stream").encode()).hexdigest()[:5]
    return {"name": f"{begins}-{digest}", **document}


def _task(data: TaskData, method: Method, number: int) -> dict[str, Any]:
    task: dict[str, Any] = {
        "name": data.name,
        "data": f"jsonl:{data.train}",
        "labels": list(data.labels),
        "evaluate": f"jsonl:{data.test}",
    }
    if method.first and number == 0:
        task["set"] = dict(method.first)
    if method.routed:
        task["router"] = {"data": f"jsonl:{data.train}", "public": True}
    return task
