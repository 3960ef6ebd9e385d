"""What ``federated_quality.py`` and ``dp_utility.py`` compare: methods, cells, and their sweeps.

A *cell* is a data set dealt to clients in one way, and trained on with one ε, or none. Everything
here is a function of the plan alone: the same plan makes the same sweeps, so that what there is of
them is found again.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from clients.builtin import parameter_types

LORA = {"name": "lora", "r": 8, "alpha": 16}
CORES = {"name": "lora-sb", "r": 24, "alpha": 48}
ADAM_RATES = (3e-3, 8e-3, 2e-2, 5e-2)
CORE_RATES = (8e-3, 2e-2, 5e-2, 1.2e-1)
SGD_RATES = (1e-1, 3e-1, 1.0, 3.0)
HELD = 600
"""Training rows that learning rates are judged by; they are trained on in the reported runs."""
TUNING, TUNING_SEED = "tune", 100
"""The name of the sweep of all learning rates, and its seed, which no reported run has."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way of federated training, as it is compared.

    Attributes:
        name: as it is printed.
        strategy: the strategy and all options that set it apart.
        rates: learning rates of which one is chosen.
        optimizer: the clients'.
        adapter: what is trained.
        more: what else of a run's file it needs.
    """

    name: str
    strategy: Mapping[str, Any]
    rates: tuple[float, ...] = ADAM_RATES
    optimizer: str = "adamw"
    adapter: Mapping[str, Any] = field(default_factory=lambda: LORA)
    more: tuple[str, ...] = ()

    def values(self, rate: float) -> dict[str, Any]:
        """Return what sets a run of it apart, by the keys of a sweep's grid."""
        return {
            "strategy": dict(self.strategy),
            "adapter": dict(self.adapter),
            "optimizer": {"name": self.optimizer, "lr": rate},
            "regularizers": list(self.more),
        }


def _plain(name: str, **options: Any) -> Method:
    return Method(name, {"name": name, **options})


GROUPS: tuple[tuple[Method, ...], ...] = (
    (
        _plain("fedavg"),
        Method("ffa-lora", {"name": "ffa-lora", "orthonormal": False}),
        Method("ffa-lora, orthonormal", {"name": "ffa-lora", "orthonormal": True}),
        _plain("fedsvd"),
    ),
    (_plain("flexlora"), _plain("fedex-lora"), _plain("lora-fair"), _plain("rolora")),
    (
        Method("fed-sb", {"name": "fed-sb"}, CORE_RATES, adapter=CORES),
        _plain("flora"),
        Method("fedavg, sgd", {"name": "fedavg"}, SGD_RATES, "sgd"),
        Method("scaffold, sgd", {"name": "scaffold"}, SGD_RATES, "sgd"),
    ),
)
"""The methods of the default plan; each group is tuned and shown before the next begins."""
MORE: tuple[Method, ...] = (
    _plain("hetlora"),
    _plain("lora-a2"),
    Method("lori", {"name": "lori", "calibration": 5}),
    Method("fedprox", {"name": "fedavg"}, more=("proximal",)),
    _plain("fedavgm"),
    _plain("fedadam"),
    _plain("fedyogi"),
    _plain("fedadagrad"),
)
"""The rest, in the full plan. FedSA-LoRA is not among them, because it has no global model to
score; EigenLoRAx is not, because it starts from a library of adapters."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A data set, and how it is trained on.

    Attributes:
        data: its name.
        alpha: how unlike the clients' labels are: Dirichlet's alpha, or None for IID.
        epsilon: of a run with differential privacy, or None for one without.
    """

    data: str
    alpha: float | None
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """Return its name, as in ``sst2-dir0.5`` or ``sst2-dir0.5-eps3``."""
        private = "" if self.epsilon is None else f"-eps{self.epsilon:g}"
        return f"{self.data}-{'iid' if self.alpha is None else f'dir{self.alpha:g}'}{private}"

    @property
    def title(self) -> str:
        """Return it as people read it, as in ``sst2, alpha = 0.5``."""
        private = "" if self.epsilon is None else f", ε = {self.epsilon:g}"
        alpha = "infinity" if self.alpha is None else f"{self.alpha:g}"
        return f"{self.data}, alpha = {alpha}{private}"


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set's labels, and the files of what is trained on and scored."""

    labels: tuple[str, ...]
    train: Path
    test: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, in the order in which it is run.

    Attributes:
        groups: the methods; the first method of the first group is what communication is equal to.
        cells: the first is the one that learning rates are tuned in.
        seeds: each decides first tensors, batches and who has which example.
        rounds: of a run at equal steps.
        tuning_rounds: of a run that tries a learning rate.
        steps: of each client a round.
        batch_size: examples a step.
        depth: how many of the groups each cell has; empty for all of them everywhere.
        clients: among which the data are dealt.
        cohort: how many of them train in a round; None for all.
        privacy: what a private run's file says of it besides its ε.
        equal_bytes: whether methods are also compared by what they send.
        every: rounds from one evaluation to the next.
        max_length: of a text in tokens.
        device: where clients train.
        model: the base model.
        compute_dtype: what its weights are held in and computed with.
    """

    groups: tuple[tuple[Method, ...], ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 8
    tuning_rounds: int = 4
    steps: int = 8
    batch_size: int = 8
    depth: tuple[int, ...] = ()
    clients: int = 10
    every: int = 2
    max_length: int = 48
    device: str = "cpu"
    model: str = "builtin:minilm"
    compute_dtype: str = "bf16"
    cohort: int | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)
    equal_bytes: bool = True

    @property
    def methods(self) -> tuple[Method, ...]:
        """Return all methods, in order."""
        return tuple(method for group in self.groups for method in group)

    @property
    def reference(self) -> Method:
        """Return the method whose bytes the others may spend."""
        return self.methods[0]

    def methods_in(self, cell: Cell) -> tuple[Method, ...]:
        """Return the methods that a cell is to have in the end."""
        groups = self.groups[: self._depth_of(cell)]
        return tuple(method for group in groups for method in group)

    def _depth_of(self, cell: Cell) -> int:
        return self.depth[self.cells.index(cell)] if self.depth else len(self.groups)

    def stages(self) -> Iterator[tuple[Cell, int, tuple[Method, ...]]]:
        """Yield what is run after what: a cell, a seed, and the methods that it has by then.

        A group goes through all its cells before the next group begins.
        """
        for count in range(1, len(self.groups) + 1):
            due = tuple(method for group in self.groups[:count] for method in group)
            for cell in self.cells:
                if count <= self._depth_of(cell):
                    for seed in self.seeds:
                        yield cell, seed, due

    def base(self, cell: Cell, seed: int, data: DataSet) -> dict[str, Any]:
        """Return what the runs of a cell and a seed have in common, as in a run's file."""
        dealt = {"by": "iid"} if cell.alpha is None else {"by": "dirichlet", "alpha": cell.alpha}
        more: dict[str, Any] = {} if self.cohort is None else {"cohort": {"size": self.cohort}}
        if cell.epsilon is not None:
            # the data are public, and a run that is repeated is to be the same
            more["privacy"] = {"epsilon": cell.epsilon, "insecure_seed": seed, **self.privacy}
        return {
            "model": {
                "id": self.model,
                "max_length": self.max_length,
                "compute_dtype": self.compute_dtype,
            },
            "labels": list(data.labels),
            "clients": {
                "simulate": {
                    "data": f"jsonl:{data.train}",
                    **dealt,
                    "parts": self.clients,
                    "seed": seed,
                    "public": True,
                }
            },
            "evaluate": {"data": f"jsonl:{data.test}", "every": self.every},
            "rounds": self.rounds,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "backend": "inline",
            "device": self.device,
            **more,
        }


def dtype_for(device: str) -> str:
    """Return what to compute with: bfloat16 without AMX takes 1.75 times as long on a processor."""
    return "float32" if device == "cpu" else "bf16"


def only(plan: Plan, names: Sequence[str]) -> Plan:
    """Return the part of a plan that is about some methods, beside its reference.

    Raises:
        SystemExit: if the plan has no such method.
    """
    known = [method.name for method in plan.methods]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only: the plan has no {', '.join(unknown)} ({'; '.join(known)})")
    wanted = {*names, plan.reference.name}
    groups = tuple(tuple(m for m in group if m.name in wanted) for group in plan.groups)
    made = replace(plan, groups=groups)
    asked = set(names)
    cells = [
        n for n, cell in enumerate(plan.cells) if asked & {m.name for m in made.methods_in(cell)}
    ]
    depth = tuple(plan.depth[n] for n in cells) if plan.depth else ()
    return replace(made, cells=tuple(plan.cells[n] for n in cells), depth=depth)


def tuning_sweep(plan: Plan, methods: Sequence[Method], data: DataSet) -> dict[str, Any]:
    """Return the sweep of methods' learning rates, on ``data`` of the first cell."""
    base = plan.base(plan.cells[0], TUNING_SEED, data)
    base["rounds"] = base["evaluate"]["every"] = plan.tuning_rounds
    chosen = [method.values(rate) for method in methods for rate in method.rates]
    return sweep_document(TUNING, TUNING_SEED, base, chosen)


def cell_sweep(cell: Cell, seed: int) -> str:
    """Return the name of the sweep of a cell's runs with one seed."""
    return f"{cell.name}-s{seed}"


def sweep_document(
    name: str, seed: int, base: Mapping[str, Any], chosen: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a sweep's file: the runs of ``chosen`` values and no others of their grid."""
    grid: dict[str, list[Any]] = {key: [] for key in chosen[0]}
    for values in chosen:
        for key, value in values.items():
            if value not in grid[key]:
                grid[key].append(value)
    return {
        "name": name,
        "base": {"name": name, **base},
        "grid": grid,
        "only": [dict(values) for values in chosen],
        "seeds": [seed],
        "max_runs": len(chosen),
    }


def write_sweep(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write a sweep's file and return where; one of the same name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True), "utf-8")
    return path


def find_data(folder: Path, names: Iterable[str]) -> dict[str, DataSet]:
    """Return data sets of a folder that has a ``manifest.json``.

    Raises:
        SystemExit: if it has none, or one of the sets is not in it.
    """
    try:
        listed = json.loads((folder / "manifest.json").read_text("utf-8"))["datasets"]
    except OSError:
        raise SystemExit(
            f"there is no {folder / 'manifest.json'}: give the folder of the data sets by --data, "
            "or measure on what is built in by --quick"
        ) from None
    known = {one["name"]: one for one in listed}
    found = {}
    for name in names:
        if name not in known:
            raise SystemExit(f"{folder} has no data set {name!r} ({', '.join(known)})")
        files = [folder / known[name]["splits"][split]["file"] for split in ("train", "test")]
        found[name] = DataSet(tuple(known[name]["labels"]), *files)
    return found


def built_in(folder: Path, train: int, test: int) -> DataSet:
    """Write so many rows of parameter types into ``folder`` and return them as a data set."""
    paths = []
    for split, count in (("train", train), ("test", test)):
        rows = parameter_types.rows(split="train" if split == "train" else "test")
        kept = [{"text": row["text"], "label": row["label"]} for row in rows[:: len(rows) // count]]
        paths.append(written(folder / f"parameter-types.{split}.jsonl", kept[:count]))
    return DataSet(tuple(parameter_types.LABELS), *paths)


def held_back(data: DataSet, folder: Path, held: int = HELD) -> DataSet:
    """Return a data set's training rows as what is trained on and what learning rates see.

    Its test rows are in neither: nothing is tuned on what is reported.
    """
    opened = gzip.open if data.train.suffix == ".gz" else open
    with opened(data.train, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    held = min(held, len(rows) // 4)
    stem = data.train.name.partition(".")[0]
    train = written(folder / f"{stem}.fit.jsonl", rows[held:])
    return DataSet(data.labels, train, written(folder / f"{stem}.held.jsonl", rows[:held]))


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as lines of JSON and return where; a file that has them already is left alone."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
    return path
