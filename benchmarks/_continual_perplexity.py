"""What tasks do to a small language model's own language: CURLoRA's claim (2408.14572).

The base model is one that was trained on children's stories. Its own language is what it tells
itself: stories sampled from it, at a temperature of 0.7. Three tasks that are nothing like them
follow (Shakespeare, news, reviews), in equal steps. Every learning rate is
shown, since a method that changes little also ruins little: compare rows of equal loss. The one
that is marked has the lowest loss on all three tasks at the end, on rows held back from training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _continual_bench import Streams, with_streams
from _continual_data import lines_of
from _continual_plan import CUR_RATES, TUNING_SEED, Choice, Method, named
from _continual_results import FREE, Found
from _figures import Figure, show
from _quality_plan import written
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

TASKS = ("shakespeare_speakers", "agnews", "amazon5")
BASE = "tinystories-656k"
_LAYERS = ["q_proj", "k_proj", "v_proj"]
_LORA = {"name": "lora", "r": 8, "alpha": 16, "target_modules": _LAYERS}
"""10,240 trained numbers; so have cores of 41 x 41 in six layers, within two per cent."""
_FROZEN_A = {**_LORA, "r": 17, "alpha": 34}
_TEMPERATURE = 0.7
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _cur(rank: int) -> Mapping[str, Any]:
    adapter = {"name": "curlora", "r": rank, "target_modules": _LAYERS}
    return {"adapter": adapter, "strategy": "fed-sb"}


METHODS: tuple[Method, ...] = (
    Method("lora", "rank 8, trained on", {"start": "continue", "adapter": _LORA}, _RATES),
    Method("curlora-41", "as many trained numbers", _cur(41), CUR_RATES),
    Method("curlora-16", "the paper's rank", _cur(16), CUR_RATES),
    Method(
        "o-lora-hard",
        "A frozen outside of earlier ones",
        {
            "adapter": _FROZEN_A,
            "strategy": "ffa-lora",
            "regularizers": [{"name": "o-lora", "form": "hard"}],
        },
        (3e-3, 1e-2, 3e-2, 1e-1),
    ),
    Method(
        "l2-sp",
        "near the task's start",
        {"adapter": _LORA, "regularizers": [{"name": "l2-sp"}]},
        _RATES[1:3],
        (0.1, 1.0),
    ),
    Method(
        "lwf",
        "the task's start is the teacher",
        {"adapter": _LORA, "regularizers": [{"name": "lwf"}]},
        _RATES[1:3],
        (1.0, 4.0),
    ),
)
"""In the order in which they are run."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained and measured: steps a task, texts a split, tokens of a text, seeds."""

    steps: int = 60
    train: int = 400
    test: int = 60
    max_length: int = 96
    seeds: tuple[int, ...] = (0,)
    methods: tuple[Method, ...] = METHODS


FULL = Size(steps=300, train=2000, test=400, max_length=128, seeds=(0, 1, 2))
QUICK = Size(1, 40, 8, 32, methods=(replace(METHODS[0], rates=_RATES[:1]),))


@dataclass(frozen=True, slots=True)
class Perplexities:
    """What there is: by method and choice, on reported rows by seed, and on held-back rows."""

    size: Size
    found: Mapping[tuple[str, Choice, int], Found]

    def best(self, method: Method) -> Choice | None:
        """Return the choice with the lowest loss on held-back rows; None before all have ended."""
        tried = [self.found.get((method.name, choice, TUNING_SEED)) for choice in method.choices]
        losses = [one.scores[FREE]["average"] for one in tried if one is not None and one.done]
        ended = [one for one in tried if one is not None and (one.done or one.failed)]
        if len(ended) < len(method.choices) or not losses:
            return None
        where = [n for n, one in enumerate(tried) if one is not None and one.done]
        return method.choices[where[losses.index(min(losses))]]

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each stream that is not done."""
        for method in self.size.methods:
            for choice in method.choices:
                for seed in (*self.size.seeds, TUNING_SEED):
                    one = self.found.get((method.name, choice, seed))
                    if one is None or not one.done:
                        why = f": {one.failed}" if one is not None and one.failed else ""
                        yield f"{method.name} at {choice[0]:g}, seed {seed}{why}"


def measure(given: argparse.Namespace, home: Path) -> Perplexities:
    """Run what is missing, and return what there is."""
    size = FULL if given.full else QUICK if given.quick else Size()
    return with_streams(given, home, lambda streams: _measured(given, size, streams))


def _measured(given: argparse.Namespace, size: Size, streams: Streams) -> Perplexities:
    folder = given.data.resolve()
    base = folder / "models" / BASE
    if not base.exists():
        raise SystemExit(f"there is no {base}: give the folder of the data sets by --data")
    files = {task: _files(task, folder, streams.workspace.home / "data", size) for task in TASKS}
    stories = streams.workspace.home / "data" / f"stories-{size.test}-{size.max_length}.jsonl"
    if not stories.exists():
        written(stories, [{"text": text} for text in _told(base, size)])
    found: dict[tuple[str, Choice, int], Found] = {}
    for seed in (*size.seeds, TUNING_SEED):
        for method in size.methods:
            for choice in method.choices:
                document = _document(base, size, (method, choice), seed, (files, stories))
                if not given.report:
                    streams.drive(document)
                if (one := streams.known(document)) is not None:
                    found[method.name, choice, seed] = one
    return Perplexities(size, found)


def _files(task: str, folder: Path, home: Path, size: Size) -> Mapping[str, Path]:
    """Write what a task trains on and is measured by, when tuned and when reported."""
    rows, test = (
        [{"text": row["text"]} for row in lines_of(folder / f"{task}.{split}.jsonl.gz")]
        for split in ("train", "test")
    )
    split = {
        "train": rows[: size.train],
        "test": test[: size.test],
        "held": rows[size.train : size.train + size.test],
    }
    return {k: written(home / f"{task}-{len(v)}.{k}.jsonl", v) for k, v in split.items()}


def _told(base: Path, size: Size) -> list[str]:
    """Return stories that the base model tells, as many as a task's test set has texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(0)
    start = torch.tensor([tokenizer("Once upon a time")["input_ids"]] * size.test)
    said = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        temperature=_TEMPERATURE,
        max_length=size.max_length,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(said)
    begins, ends = tokenizer.bos_token, tokenizer.eos_token
    return [text.removeprefix(begins).partition(ends)[0].strip() for text in texts]


def _document(
    base: Path,
    size: Size,
    asked: tuple[Method, Choice],
    seed: int,
    data: tuple[Mapping[str, Mapping[str, Path]], Path],
) -> dict[str, Any]:
    """Return a stream's file."""
    (method, choice), (files, stories) = asked, data
    test = "held" if seed == TUNING_SEED else "test"
    document = {
        "base": {
            "seed": seed,
            "model": {"id": str(base), "max_length": size.max_length},
            "task": "causal-lm",
            "strategy": "fedavg",
            "clients": {"simulate": {"by": "iid", "parts": 1, "public": True}},
            "rounds": 1,
            "steps": size.steps,
            "batch_size": 8,
            "backend": "inline",
        },
        "method": method.document(choice),
        "tasks": [
            {
                "name": task,
                "data": f"jsonl:{files[task]['train']}",
                "evaluate": f"jsonl:{files[task][test]}",
            }
            for task in TASKS
        ],
        "general": f"jsonl:{stories}",
    }
    return named(f"lm-{method.name}-s{seed}", document)


def show_perplexities(told: Perplexities, markdown: bool = False) -> None:
    """Print a line for each learning rate of each method, and what is missing."""
    size = told.size
    console = Console(width=None if sys.stdout.isatty() else 200)
    title = (
        f"{BASE}; {len(TASKS)} tasks of {size.steps} steps of 8 texts of at most "
        f"{size.max_length} tokens; mean over seeds; * chosen on held-back rows"
    )
    table = Table(
        "method",
        "rate",
        "loss when learned",
        "loss in the end",
        "perplexity of its own stories before",
        "after",
        title=title,
        box=MARKDOWN if markdown else None,
    )
    for method, choice, (learned, last, before, after) in _lines(told):
        chosen = " *" if told.best(method) == choice else ""
        rate, weight = choice
        text = f"{rate:g}{'' if weight is None else f', weight {weight:g}'}{chosen}"
        numbers = (f"{learned:.3f}", f"{last:.3f}", f"{before:.2f}", f"{after:.2f}")
        table.add_row(f"{method.name} ({method.about})", text, *numbers)
    console.print(table)
    lines = list(told.missing())
    console.print("missing:" if lines else "missing: nothing", highlight=False)
    for line in lines:
        console.print(f"  {line}", highlight=False)


def json_perplexities(told: Perplexities) -> None:
    """Print a JSON object a method, a line each: the perplexity at the rate that was chosen."""
    figures = [
        Figure(
            f"perplexity of its own stories after three tasks, {method.name}",
            after,
            "perplexity",
            None,
            "lower",
            "" if method.name == "lora" else "lora",
            f"before: {before:.3f}; loss when learned: {learned:.3f}; in the end: {last:.3f}",
        )
        for method, choice, (learned, last, before, after) in _lines(told)
        if told.best(method) == choice
    ]
    show("Perplexity", figures, as_json=True)


def _lines(told: Perplexities) -> Iterator[tuple[Method, Choice, tuple[float, ...]]]:
    """Yield losses when learned and in the end, and perplexities before and after, by choice."""
    for method in told.size.methods:
        for choice in method.choices:
            known = (told.found.get((method.name, choice, seed)) for seed in told.size.seeds)
            done = [one for one in known if one is not None and one.done]
            if done:
                rows = [
                    (
                        one.scores[FREE]["learning_accuracy"],
                        one.scores[FREE]["average"],
                        *one.general,
                    )
                    for one in done
                ]
                yield method, choice, tuple(map(fmean, zip(*rows, strict=True)))
