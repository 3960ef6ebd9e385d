"""What merges of task adapters are worth, and what they cost, beside PEFT's.

    python benchmarks/merging.py [--quick] [--json] [--markdown] [--tasks 4|8] [--home DIR]
                                 [--part accuracy|time|all] [--size 4096]

*Accuracy.* Adapters of all-MiniLM-L6-v2 are trained through weft, one a task, each from the base
model, and one of all tasks together, each with the best of three learning rates on held-out rows;
runs that a home has are not run again. The tasks are texts of ``../shared/data``; all versions have
one label set, and a head whose rows a merge takes by task.
Each method merges them with equal weights, of which the best of 1/T, 1/2 and 1 is chosen on
held-out rows; the score is the mean over tasks of the accuracy on test rows among the task's own
labels.

*Time.* One layer ``[d, d]`` and adapters of rank 16 in float32, merged by weft and by PEFT's
``add_weighted_adapter``, once, each in a process of its own of one thread: the processor's seconds,
which others do not lengthen by waiting, and the memory that it adds at its peak.
mergekit needs dense checkpoints and its own pins of torch and transformers: it is not measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, show
from torch import nn

from clients.assignment import DataSpec, PluginChoice
from orchestrator import service
from orchestrator.config import parse_config
from orchestrator.merge_parts import Allow, parts_of
from orchestrator.merge_search import Looking, searched_merge
from orchestrator.workspace import Workspace, open_workspace
from storage.refs import UnknownVersion
from strategies.merges import MERGES
from strategies.plugins import BadOptions

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FOUR = ("agnews", "dbpedia14", "sst2", "amazon5")
EIGHT = (*FOUR, "clinc150", "banking77", "mdsent5", "mnli")
RANK = 16
TIMED = {"svd": {"rank": RANK}, "cat": {}, "ties": {"density": 0.2, "scope": "layer", "rank": RANK}}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "layer-wise": {"layers": {}, "method": "svd"},
    "lori": {"sparsity": 0.5},
    "eigenlorax": {"rank": RANK},
}


@dataclass(frozen=True)
class Size:
    """How much is trained and scored."""

    steps: int
    train: int
    dev: int
    test: int
    trials: int


FULL, QUICK = Size(150, 1600, 200, 400, 24), Size(4, 64, 16, 32, 4)
RATES = (3e-4, 1e-3, 3e-3)


@dataclass
class Row:
    """What one method reaches."""

    method: str
    weight: float | None
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0


class Bench:
    """Task adapters of one home, and how they are merged and scored."""

    def __init__(self, workspace: Workspace, tasks: Sequence[str], size: Size) -> None:
        self.workspace, self.tasks, self.size = workspace, tasks, size
        self.labels: dict[str, list[str]] = {}
        folder = workspace.home / "texts"
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads((SHARED / "manifest.json").read_text("utf-8"))
        every: list[dict[str, Any]] = []
        for task in tasks:
            self.labels[task] = [f"{task}: {name}" for name in _labels(facts, task)]
            rows = self._rows(task, "train", size.train + size.dev)
            self._write(folder / f"{task}.dev.jsonl", rows[: size.dev])
            self._write(folder / f"{task}.train.jsonl", rows[size.dev :])
            self._write(folder / f"{task}.test.jsonl", self._rows(task, "test", size.test))
            every += rows[size.dev :]
        self._write(folder / "joint.train.jsonl", every)
        self.folder = folder

    def _rows(self, task: str, split: str, count: int) -> list[dict[str, Any]]:
        path = SHARED / f"{task}.{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        random.Random(0).shuffle(rows)
        return [
            {
                "text": " ".join(filter(None, (row["text"], row.get("text_pair")))),
                "label": self.labels[task][row["label"]],
            }
            for row in rows[:count]
        ]

    @staticmethod
    def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def tuned(self, name: str) -> str:
        """Return the version of a task, or of all, at the rate that is best on held-out rows."""
        tasks = self.tasks if name == "joint" else [name]
        versions = [self._trained(name, rate) for rate in RATES]
        accuracy = [sum(self.scores(one, "dev", tasks).values()) for one in versions]
        best = accuracy.index(max(accuracy))
        print(f"{name}: learning rate {RATES[best]:g}", file=sys.stderr, flush=True)
        return versions[best]

    def _trained(self, task: str, rate: float) -> str:
        """Return the version of a task and a rate; train it if there is none."""
        name = f"{task}-of-{len(self.tasks)}-{rate:g}"
        try:
            return self.workspace.store.version(name).id
        except UnknownVersion:
            pass
        every = [label for task in self.tasks for label in self.labels[task]]
        steps = self.size.steps * (len(self.tasks) if task == "joint" else 1)
        data = f"jsonl:{self.folder / f'{task}.train.jsonl'}"
        document = {
            "name": name,
            "model": {"id": "builtin:minilm", "max_length": 64},
            "labels": every,
            "adapter": {"name": "lora", "r": RANK, "alpha": 2 * RANK},
            "strategy": "fedavg",
            "optimizer": {"name": "adamw", "lr": rate},
            "clients": {"simulate": {"data": data, "by": "iid", "parts": 1}},
            "rounds": 1,
            "steps": steps,
            "batch_size": 16,
            "backend": "inline",
            "seed": 1,
        }
        return service.launch(self.workspace, parse_config(document))

    def scores(self, ref: str, split: str, tasks: Sequence[str] = ()) -> dict[str, float]:
        """Return the accuracy on each of some tasks, or of all, among its own labels."""
        found = {}
        for task in tasks or self.tasks:
            uri = f"jsonl:{self.folder / f'{task}.{split}.jsonl'}"
            data = DataSpec(uri, labels=tuple(self.labels[task]))
            metrics = service.evaluate(self.workspace, ref, data).metrics
            found[task] = metrics.get("task_accuracy", metrics["accuracy"])
        return found

    def merged(self, refs: Sequence[str], method: str) -> Row:
        """Return what a method makes of versions with the best of a few equal weights."""
        choice = PluginChoice(method, SETTINGS.get(method, {}))
        module = sys.modules[MERGES.get(method).factory.__module__]
        ratios = module.WEIGHTS == "ratios"  # then the size of equal weights says nothing
        best: tuple[float, float, str, float] | None = None
        for weight in (1.0,) if ratios else (1 / len(self.tasks), 0.5, 1.0):
            begun = time.perf_counter()
            try:
                ref = service.merge(self.workspace, refs, choice, "merged", [weight] * len(refs))
            except BadOptions as error:
                return Row(method, None, note=f"refused: {error}"[:90])
            took = time.perf_counter() - begun
            dev = self.scores(ref, "dev")
            mean = sum(dev.values()) / len(dev)
            if best is None or mean > best[0]:
                best = mean, weight, ref, took
        assert best is not None
        return Row(method, best[1], self.scores(best[2], "test"), best[3])

    def searched(self, refs: Sequence[str]) -> Row:
        """Return what svd makes of versions with weights that are looked for on held-out rows."""
        parts = parts_of(self.workspace, refs, Allow())
        uri = f"jsonl:{self.folder / 'all.dev.jsonl'}"
        texts = [(self.folder / f"{task}.dev.jsonl").read_text("utf-8") for task in self.tasks]
        (self.folder / "all.dev.jsonl").write_text("".join(texts), "utf-8")
        choice = PluginChoice("svd", MERGES.get("svd").check({"rank": RANK * len(self.tasks)}))
        looking = Looking(DataSpec(uri), self.size.trials)
        begun = time.perf_counter()
        made = searched_merge(self.workspace, parts, choice, [0.5] * len(self.tasks), looking)
        took = time.perf_counter() - begun
        weights = ", ".join(f"{w:.2f}" for w in made.weights)
        version = made.commit(self.workspace)
        return Row("svd, searched", None, self.scores(version, "test"), took, f"weights {weights}")


def accuracy(bench: Bench) -> list[Row]:
    """Train what lacks, merge by every method, and return what each reaches."""
    refs = [bench.tuned(task) for task in bench.tasks]
    single = {}
    for task, ref in zip(bench.tasks, refs, strict=True):
        single |= bench.scores(ref, "test", [task])
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(f"{row.method}: {row.mean:.3f} {row.note}", file=sys.stderr, flush=True)

    add(Row("single-task adapters", None, single))  # the two that no merge competes with
    add(Row("joint training", None, bench.scores(bench.tuned("joint"), "test")))
    for name in MERGES.names():
        add(bench.merged(refs, name))
    add(bench.searched(refs))
    return rows


def _labels(facts: Any, task: str) -> list[str]:
    [found] = [one for one in facts["datasets"] if one["name"] == task]
    return [str(label) for label in found["labels"]]


def factors(size: int, adapters: int) -> list[dict[str, torch.Tensor]]:
    """Return adapters of one square layer."""
    made = []
    for seed in range(adapters):
        generator = torch.Generator().manual_seed(seed)
        made.append(
            {
                "layer.lora_A.weight": torch.randn(RANK, size, generator=generator),
                "layer.lora_B.weight": torch.randn(size, RANK, generator=generator),
                "layer.scaling": torch.tensor(1.0),
            }
        )
    return made


def timed(side: str, method: str, size: int, adapters: int) -> dict[str, float]:
    """Return processor seconds and megabytes of one merge, by ``weft`` or ``peft``."""
    torch.set_num_threads(1)
    parts, weights = factors(size, adapters), [0.5] * adapters
    if side == "weft":
        MERGES.get(method).build(factors(64, 2), [0.5, 0.5], **TIMED[method])
        before, begun = _peak(), time.process_time()
        MERGES.get(method).build(parts, weights, **TIMED[method])
    else:
        import peft

        model = nn.Sequential()
        model.add_module("layer", nn.Linear(size, size, bias=False))
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
        wrapped = peft.get_peft_model(model, config, adapter_name="0")
        for number in range(1, adapters):
            wrapped.add_adapter(str(number), config)
        layer = wrapped.base_model.model.layer
        for number, part in enumerate(parts):
            layer.lora_A[str(number)].weight.data.copy_(part["layer.lora_A.weight"])
            layer.lora_B[str(number)].weight.data.copy_(part["layer.lora_B.weight"])
        options: dict[str, Any] = {
            "svd": {"combination_type": "svd", "svd_rank": RANK},
            "cat": {"combination_type": "cat"},
            "ties": {"combination_type": "ties_svd", "density": 0.2, "svd_rank": RANK},
        }[method]
        before, begun = _peak(), time.process_time()
        names = [str(n) for n in range(adapters)]
        wrapped.add_weighted_adapter(names, weights, "merged", **options)
    return {"seconds": time.process_time() - begun, "megabytes": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def costs(size: int, adapters: int) -> list[Figure]:
    """Return time and memory of merges beside PEFT's, each in a process of its own."""
    figures = []
    setting = f"one layer [{size}, {size}], {adapters} adapters of rank {RANK}"
    for method in TIMED:
        found = {}
        for side in ("weft", "peft"):
            call = [sys.executable, __file__, "--one", f"{side},{method},{size},{adapters}"]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        ours, theirs = found["weft"], found["peft"]
        goal = 100.0 if method == "svd" and size >= 4096 else None
        peer = f"PEFT {theirs['seconds']:.3g} s, {theirs['megabytes']:.0f} MB"
        own = f"weft {ours['seconds']:.3g} s, {ours['megabytes']:.0f} MB"
        ratio = theirs["seconds"] / ours["seconds"]
        figures.append(
            Figure(f"{method} merge", ratio, "x", goal, "higher", peer, f"{setting}; {own}; {peer}")
        )
    return figures


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """Return the mean accuracy of each row, and the best merge beside single-task adapters."""
    setting = f"mean accuracy over {len(rows[0].scores)} tasks"
    found = [
        Figure(
            row.method,
            row.mean,
            "",
            None,
            "higher",
            "",
            f"{setting}; {row.seconds:.2f} s {row.note}",
        )
        for row in rows
    ]
    best = max(rows[2:], key=lambda row: row.mean)
    share = best.mean / rows[0].mean if rows[0].mean else 0.0
    what = f"{best.method} over single-task adapters"
    return [*found, Figure("best merge", share, "", 0.9, "higher", "single-task adapters", what)]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of docs/merging.md."""
    tasks = list(rows[0].scores)
    lines = [
        f"| method | weight | {' | '.join(tasks)} | mean |",
        "|---|" + "---|" * (len(tasks) + 2),
    ]
    for row in rows:
        weight = "" if row.weight is None else f"{row.weight:g}"
        if row.scores:
            cells = " | ".join(f"{row.scores[task]:.3f}" for task in tasks)
            lines.append(f"| {row.method} | {weight} | {cells} | {row.mean:.3f} |")
        else:
            lines.append(f"| {row.method} | {row.note} |" + " |" * (len(tasks) + 1))
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--tasks", type=int, choices=(4, 8), default=4)
    parser.add_argument("--part", choices=("accuracy", "time", "all"), default="all")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--home", help="where the runs are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        side, method, size, adapters = given.one.split(",")
        print(json.dumps(timed(side, method, int(size), int(adapters))))
        return
    figures: list[Figure] = []
    if given.part in ("accuracy", "all"):
        tasks = (FOUR if given.tasks == 4 else EIGHT)[: 2 if given.quick else None]
        with tempfile.TemporaryDirectory() as scratch:
            workspace = open_workspace(Path(given.home or scratch).absolute())
            rows = accuracy(Bench(workspace, tasks, QUICK if given.quick else FULL))
        if given.markdown:
            print(markdown(rows))
        figures += figures_of(rows)
    if given.part in ("time", "all"):
        figures += costs(256 if given.quick else given.size, 4)
    show("Merging", figures, given.json)


if __name__ == "__main__":
    main()
