"""What goes together: strategy x adapter x regularizer x privacy, by the planner's own refusals.

Plans are made on the shapes of a model of one small layer, whose config is written for it: nothing
is downloaded, loaded or trained.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clients import models
from clients.adapters import ADAPTERS, Adapter
from clients.assignment import ModelSpec
from clients.regularizers import REGULARIZERS
from orchestrator.config import BadConfig, parse_config
from orchestrator.plan import Plan, Start
from orchestrator.refusals import Shapes, refuse_senseless
from strategies import STRATEGIES
from strategies.plugins import BadOptions, Plugin

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_MODELS: Mapping[str, Mapping[str, Any]] = {
    "classification": {"model_type": "bert", "vocab_size": 64, "intermediate_size": 32, **_SIZES},
    "causal-lm": {"model_type": "llama", "vocab_size": 64, "intermediate_size": 32, **_SIZES},
}
_NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a model without weights is no model
_INNER = ("fedavg", "ffa-lora")
"""What a strategy wraps that must be told what: the first that it accepts."""
_NEEDED: Mapping[str, Any] = {"inner": _INNER[0], "invocation": [1], "num_groups": 8}
"""Options that a plug-in may need to be told, and cannot be told without a run."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A combination, and why a run of it is refused.

    Attributes:
        strategy: by name, as the other two.
        adapter: with its default options.
        regularizer: empty for none.
        private: whether with example-level DP.
        task: the kind of model; ``causal-lm`` where the adapter is for that alone.
        reason: the planner's, or empty where it refuses nothing.
    """

    strategy: str
    adapter: str
    regularizer: str
    private: bool
    task: str
    reason: str


def matrix(
    strategies: Sequence[str] | None = None, adapters: Sequence[str] | None = None
) -> list[Cell]:
    """Return combinations of plug-ins with their default options, each as it is planned.

    What is refused without a regularizer is refused with any, for the same reason.

    Args:
        strategies: which; by default all.
        adapters: which; by default all.
    """
    found = []
    known: dict[tuple[ModelSpec, str], Mapping[str, tuple[int, ...]]] = {}

    def shapes(model: ModelSpec, adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
        if (model, repr(adapter)) not in known:
            known[model, repr(adapter)] = models.shapes(model, adapter)
        return known[model, repr(adapter)]

    with tempfile.TemporaryDirectory() as folder:
        for task, config in _MODELS.items():
            (Path(folder) / task).mkdir()
            (Path(folder) / task / "config.json").write_text(json.dumps(config))
            (Path(folder) / task / "model.safetensors").write_bytes(_NO_WEIGHTS)
        axes = (strategies or STRATEGIES.names(), adapters or ADAPTERS.names(), (False, True))
        for strategy, adapter, private in itertools.product(*axes):
            task, refused = _task(adapter), ""
            for regularizer in ("", *REGULARIZERS.names()):
                reason = refused or _reason(
                    _document(strategy, adapter, regularizer, private),
                    Path(folder) / task,
                    shapes,
                )
                refused = refused if regularizer else reason
                found.append(Cell(strategy, adapter, regularizer, private, task, reason))
    return found


def markdown(cells: Sequence[Cell]) -> str:
    """Return the matrix as Markdown: what does not go together, each reason once.

    Strategy x adapter; strategy x regularizer with adapter lora; and below, what with another
    adapter follows from neither.
    """
    notes: dict[str, int] = {}
    by_kind = {(c.strategy, c.adapter, c.regularizer, c.private): c for c in cells}
    strategies, adapters, regularizers = (
        list(dict.fromkeys(getattr(c, kind) for c in cells))
        for kind in ("strategy", "adapter", "regularizer")
    )
    chosen = [one for one in regularizers if one]

    def mark(strategy: str, adapter: str, regularizer: str) -> str:
        plain, private = (by_kind[strategy, adapter, regularizer, dp] for dp in (False, True))
        if plain.reason:
            return f"no [{_number_of(plain, notes)}]"
        return f"no DP [{_number_of(private, notes)}]" if private.reason else "yes"

    first = [[s, *(mark(s, a, "") for a in adapters)] for s in strategies]
    second = [[s, *(mark(s, "lora", r) for r in chosen)] for s in strategies]
    rest: dict[tuple[str, str, str], list[str]] = {}
    for s, a, r in itertools.product(strategies, adapters, chosen):
        own, without, with_lora = mark(s, a, r), mark(s, a, ""), mark(s, "lora", r)
        if own != (without if without.startswith("no [") or with_lora == "yes" else with_lora):
            rest.setdefault((a, r, own), []).append(s)
    lines = ["## Strategy and adapter", "", *_table(["strategy", *adapters], first), ""]
    lines += ["## Strategy and regularizer, with adapter `lora`", ""]
    lines += [*_table(["strategy", *chosen], second), ""]
    if rest:
        lines += ["With other adapters, besides:", ""]
        lines += [f"- `{a}` with `{r}`: {own}: {', '.join(of)}" for (a, r, own), of in rest.items()]
        lines += [""]
    lines += ["## Reasons", "", *(f"{number}. {note}" for note, number in notes.items())]
    return "\n".join(lines) + "\n"


def _number_of(cell: Cell, notes: dict[str, int]) -> str:
    """Return the number of a cell's reason, told without the names that its place says."""
    text = cell.reason
    for kind in ("strategy", "adapter", "regularizer"):
        text = text.replace(f"{kind} {getattr(cell, kind)!r}", f"the {kind}")
    return str(notes.setdefault(text, len(notes) + 1))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _document(strategy: str, adapter: str, regularizer: str, private: bool) -> dict[str, Any]:
    return {
        "name": "matrix",
        "strategy": _choice(STRATEGIES.get(strategy)),
        "adapter": {**_choice(ADAPTERS.get(adapter)), "r": 4},
        "regularizers": [_choice(REGULARIZERS.get(regularizer))] if regularizer else [],
        "optimizer": "sgd",
        "steps": 1,
        "clients": {"select": {}},
        "privacy": {"epsilon": 8} if private else None,
        "task": _task(adapter),
        "labels": ["a", "b"] if _task(adapter) == "classification" else [],
    }


def _told(plugin: Plugin) -> Mapping[str, Any]:
    """Return the options that a plug-in must be told."""
    told = {k: v for k, v in _NEEDED.items() if k in plugin.options}
    if "inner" not in told:
        return told
    for inner in _INNER:
        try:
            plugin.build(**plugin.check({**told, "inner": inner}))
        except BadOptions:
            continue
        return {**told, "inner": inner}
    return told


def _choice(plugin: Plugin) -> dict[str, Any]:
    return {"name": plugin.name, **_told(plugin)}


@cache
def _task(adapter: str) -> str:
    """Return the kind of model that an adapter is for."""
    plugin = ADAPTERS.get(adapter)
    built = plugin.build(**plugin.check(_told(plugin)))
    return "causal-lm" if "causal-only" in built.capabilities else "classification"


def _reason(document: Mapping[str, Any], folder: Path, shapes: Shapes) -> str:
    try:
        config = parse_config({**document, "model": str(folder)})
        plan = Plan(
            run="",
            config=config,
            model=config.model_spec("0" * 64),
            participants=(),
            start=Start(),
            **config.checked_plugins(),
        )
        refuse_senseless(plan, shapes)
    except (BadConfig, BadOptions) as error:
        return str(error)
    return ""
