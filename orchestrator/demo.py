"""``weft demo``: federate, stack, merge, trace and export, on real text and a real encoder."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clients import data
from clients.assignment import DataSpec, PluginChoice
from clients.builtin import parameter_types
from clients.evaluate import Evaluation
from clients.probe import frozen_probe
from orchestrator import service
from orchestrator.backends.base import Backend
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import RunConfig, parse_config
from orchestrator.demo_export import compare_with_peft
from orchestrator.drawing import lineage_tree
from orchestrator.progress import RunProgress
from strategies import STRATEGIES
from strategies.base import ClientSpec

LABELS = parameter_types.LABELS
TASKS = {"task-1": LABELS[:4], "task-2": LABELS[4:]}
_TRAIN, _TEST = "builtin:parameter-types?split=train", "builtin:parameter-types?split=test"
_RANK = 8
_MODEL = "builtin:minilm"
_UPPER = {_MODEL: [3, 4, 5]}  # its upper half: half the backward pass, and less to noise
_PROBED = 2000
_BASE: Mapping[str, Any] = {
    "labels": LABELS,
    "microbatch": 8,
    "clients": {"simulate": {"data": _TRAIN, "by": "column", "column": "client"}},
}
_WITH_DP: Mapping[str, Any] = {
    "batch_size": 64,
    "optimizer": {"name": "adamw", "lr": 2e-2},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0},
}
_WITHOUT_DP: Mapping[str, Any] = {
    "batch_size": 16,
    "optimizer": {"name": "adamw", "lr": 1e-2},
}


@dataclass(slots=True)
class _Demo:
    console: Console
    workspace: service.Workspace
    backend: Backend
    model: str
    strategy: str
    dp: bool
    rounds: int
    examples: int  # a client and round, with DP or without

    def config(self, name: str, *, dp: bool, **changes: Any) -> RunConfig:
        """Return the config of one of the demo's runs."""
        document = {
            **_BASE,
            **(_WITH_DP if dp else _WITHOUT_DP),
            "name": name,
            "model": {"id": self.model, "max_length": 64},
            "adapter": {"name": "lora", "r": _RANK, "layers": _UPPER.get(self.model)},
            "strategy": self.strategy,
            "regularizers": [{"name": "o-lora", "form": self._form()}],
            "rounds": self.rounds,
            "steps": self.examples // (_WITH_DP if dp else _WITHOUT_DP)["batch_size"],
            **changes,
        }
        return parse_config(document)

    def _form(self) -> str:
        """Return O-LoRA's hard form where the strategy keeps A frozen, else the soft one."""
        strategy = STRATEGIES.get(self.strategy).build()
        sample = {"x.lora_A.weight": torch.eye(2), "x.lora_B.weight": torch.eye(2)}
        state = strategy.init({**sample, "x.scaling": torch.tensor(1.0)})
        trainable = strategy.broadcast(state, ClientSpec("anyone")).trainable
        return "soft" if re.fullmatch(trainable, "x.lora_A.weight") else "hard"

    def train(self, config: RunConfig) -> str:
        """Run a federation with live progress; return the final version."""
        with RunProgress(self.console) as progress:
            return service.launch(self.workspace, config, progress, self.backend)

    def scores(self, *refs: str, labels: Sequence[str] = LABELS) -> list[Evaluation]:
        """Score versions on the held-back examples of some labels, among all types they know."""
        versions = [self.workspace.store.version(ref) for ref in refs]
        test = DataSpec(_TEST, labels=tuple(labels))
        with self.console.status("scoring on held-back files …"):
            return service.evaluate_many(
                self.workspace, [(version, test) for version in versions], backend=self.backend
            )


def run_demo(
    console: Console,
    *,
    dp: bool = True,
    strategy: str = "fedsvd",
    model: str = _MODEL,
    home: Path | None = None,
    quick: bool = False,
) -> None:
    """Run the whole demo and print what it found.

    Args:
        console: where to print.
        dp: train with DP-SGD.
        strategy: any strategy's name.
        model: any encoder.
        home: where the store is kept; by default the workspace's usual place.
        quick: one short round a run, to see the path rather than the numbers.
    """
    began = time.monotonic()
    workspace = service.open_workspace(home)
    rounds, examples = (1, 64) if quick else (4, 192)
    demo = _Demo(console, workspace, InlineBackend(), model, strategy, dp, rounds, examples)
    config = demo.config("task-1", dp=dp, task_labels=TASKS["task-1"])  # refused before anything
    sizes = _show_data(console)
    with console.status("starting Ray workers …"):
        demo.backend = service.make_backend(config, len(sizes))
    try:
        first, before = _federate(demo, config, max(sizes, key=lambda name: sizes[name]))
        merged = _continue(demo, first, before)
    finally:
        demo.backend.close()
    console.rule(f"4  what {merged} is made of")
    console.print(lineage_tree(service.lineage(workspace, merged)))
    folder = _export(demo, merged)
    seconds = time.monotonic() - began
    where = "" if home is None else f"WEFT_HOME={shlex.quote(str(home))} "
    console.print(f"\ndone in {seconds:.0f} s; next:", highlight=False)
    for line in (f"show {merged}", "runs", f"promote {merged} --to production"):
        console.print(f"  {where}weft {line}", highlight=False)
    console.print(f"  less {folder}/README.md", highlight=False)


def _show_data(console: Console) -> dict[str, int]:
    """Print who owns what; return the number of training examples by client."""
    console.rule("data: read a parameter's documentation, predict its documented type")
    with console.status("reading the docstrings of installed libraries …"):
        rows = parameter_types.rows("train")
    owned: dict[str, Counter[str]] = {}
    for row in rows:
        owned.setdefault(row["client"], Counter())[row["label"]] += 1
    table = Table("client", "examples", "most frequent types")
    for client, counts in sorted(owned.items()):
        size = counts.total()
        top = ", ".join(f"{label} {n / size:.0%}" for label, n in counts.most_common(3))
        table.add_row(client, str(size), top)
    console.print(table)
    return {client: counts.total() for client, counts in owned.items()}


def _federate(demo: _Demo, config: RunConfig, alone: str) -> tuple[str, float]:
    """Train task 1 and print what federation bought; return the version and its accuracy."""
    labels = TASKS["task-1"]
    how = f"DP-SGD to ε = {_WITH_DP['privacy']['epsilon']:g}" if demo.dp else "without DP"
    demo.console.rule(f"1  task-1 ({', '.join(labels)}), {demo.strategy}, {how}")
    trained = {f"federated, {how}": demo.train(config)}
    demo.console.rule("2  what federation bought: the same budget of steps, without the others")
    only = {"simulate": {"data": f"{_TRAIN}&client={alone}", "by": "iid", "parts": 1}}
    trained[f"{alone} alone, without DP"] = demo.train(
        demo.config("task-1-alone", dp=False, task_labels=labels, clients=only)
    )
    if demo.dp:
        trained["federated, without DP"] = demo.train(
            demo.config("task-1-open", dp=False, task_labels=labels)
        )
    spec = config.model_spec()
    with demo.console.status("fitting a linear head on the frozen base …"):
        train = data.examples(DataSpec(_TRAIN, labels=labels), spec)
        train = train[:: max(1, len(train) // _PROBED)]
        test = data.examples(DataSpec(_TEST, labels=labels), spec)
        probe, majority = frozen_probe(spec, train, test)
    table = Table("task-1", f"accuracy on {len(test)} held-back examples")
    table.add_row("always the most frequent type", f"{majority:.3f}")
    table.add_row(f"frozen base, linear head, {len(train)} examples pooled", f"{probe:.3f}")
    found = demo.scores(*trained.values(), labels=labels)
    for name, evaluation in reversed(list(zip(trained, found, strict=True))):
        table.add_row(name, f"{evaluation.metrics['accuracy']:.3f}")
    demo.console.print(table)
    return trained[f"federated, {how}"], found[0].metrics["accuracy"]


def _continue(demo: _Demo, first: str, before: float) -> str:
    """Train task 2 on top of task 1, merge both, print accuracies; return the merge's name."""
    labels = TASKS["task-2"]
    demo.console.rule(f"3  task-2 ({', '.join(labels)}), stacked on task-1 and orthogonal to it")
    second = demo.train(
        demo.config("task-2", dp=demo.dp, task_labels=labels, start="stack", start_from=first)
    )
    pair = [first, second]
    whole = service.merge(demo.workspace, pair, PluginChoice("cat"), "parameter-types")
    compress = PluginChoice("svd", {"rank": _RANK})
    small = service.merge(demo.workspace, pair, compress, "parameter-types-small")
    counts = Counter(row["label"] for row in parameter_types.rows("test"))
    table = Table("accuracy among the types known", "task-1", "task-2", "both")
    table.add_row("task-1, before", f"{before:.3f}", "unknown", "")
    names = ("merged by cat: all of both", f"merged by svd: compressed to rank {_RANK}")
    scores = demo.scores(whole, small)
    for name, evaluation in zip(names, scores, strict=True):
        cells = [_share(evaluation, counts, some) for some in (*TASKS.values(), LABELS)]
        table.add_row(name, *cells)
    demo.console.print(table)
    demo.console.print(
        "what task-1 lost is its forgetting: merged, it must be told from the types of task-2 too",
        style="dim",
    )
    return demo.workspace.store.version(whole).names[-1]


def _share(evaluation: Evaluation, counts: Mapping[str, int], labels: Sequence[str]) -> str:
    """Return the accuracy on the examples of ``labels`` alone."""
    right = sum(evaluation.label_accuracy[label] * counts[label] for label in labels)
    return f"{right / sum(counts[label] for label in labels):.3f}"


def _export(demo: _Demo, merged: str) -> Path:
    demo.console.rule("5  exported, and loaded back with plain peft and transformers")
    folder = demo.workspace.home / "exports" / merged.replace(":", "-")
    if folder.exists():
        shutil.rmtree(folder)
    service.export(demo.workspace, merged, folder)
    difference, agreed = compare_with_peft(demo.workspace, merged, folder, _TEST)
    demo.console.print(
        f"{folder}: the logits of {agreed} examples differ by at most {difference:.1e}",
        highlight=False,
    )
    return folder
