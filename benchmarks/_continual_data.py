"""The tasks of ``continual.py``: what each brings, is trained on and is measured by, as files.

The smallest piece is a *part*: a domain of CLINC150 with its fifteen intents, or a data set of its
own. A task is one part or several. Labels are written as ``part: label``, since data sets share
names such as ``positive``, and a label that a task brings is to be new.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from _quality_plan import DataSet, written

from clients.builtin import parameter_types

Split = Literal["train", "test"]
HELD_EVERY = 5
"""Of so many training rows of each label one is held back to judge learning rates by."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is never divided among tasks: its labels, and its rows by split."""

    name: str
    labels: tuple[str, ...]
    rows: Mapping[Split, tuple[Mapping[str, Any], ...]]


@dataclass(frozen=True, slots=True)
class TaskData:
    """One task: its name, the labels that it brings, and its files."""

    name: str
    labels: tuple[str, ...]
    train: Path
    test: Path


def clinc_parts(folder: Path, data: DataSet) -> dict[str, Part]:
    """Return CLINC150's domains, in the order of the manifest in ``folder``."""
    listed = json.loads((folder / "manifest.json").read_text("utf-8"))["datasets"]
    domains = next(one["domains"] for one in listed if one["name"] == "clinc150")
    rows = {"train": list(lines_of(data.train)), "test": list(lines_of(data.test))}
    return {
        name: _part(name, [data.labels[i] for i in labels], data.labels, rows, labels)
        for name, labels in domains.items()
    }


def whole_part(name: str, data: DataSet, most: Mapping[Split, int]) -> Part:
    """Return a data set as one part, with so many rows a split at most, alike by label."""
    rows = {"train": list(lines_of(data.train)), "test": list(lines_of(data.test))}
    part = _part(name, data.labels, data.labels, rows, range(len(data.labels)))
    cut = {split: tuple(_even(part, split, count)) for split, count in most.items()}
    return Part(name, part.labels, cut)


def built_in_parts(tasks: int, train: int, test: int) -> dict[str, Part]:
    """Return built-in parameter types as so many parts of two labels each, of so many rows."""
    found = {}
    for number in range(tasks):
        pair = parameter_types.LABELS[2 * number : 2 * number + 2]
        name = f"types-{number + 1}"
        labels = tuple(f"{name}: {label}" for label in pair)
        rows: dict[Split, tuple[Mapping[str, Any], ...]] = {}
        for split, count in (("train", train), ("test", test)):
            kept = [
                {"text": row["text"], "label": f"{name}: {row['label']}"}
                for row in parameter_types.rows(split=split)
                if row["label"] in pair
            ]
            rows["train" if split == "train" else "test"] = tuple(kept[:: len(kept) // count])
        found[name] = Part(name, labels, rows)
    return found


def task_data(parts: Sequence[Part], folder: Path, tuning: bool) -> TaskData:
    """Write a task's files and return it.

    Args:
        parts: what it is made of.
        folder: where its files are kept.
        tuning: train on four fifths of the training rows and measure by the rest: nothing is tuned
            on what is reported.
    """
    name = parts[0].name if len(parts) == 1 else _short(parts)
    train = [row for part in parts for row in part.rows["train"]]
    test = [row for part in parts for row in part.rows["test"]]
    if tuning:
        train, test = _held_back(train)
    stem = f"{name}.tune" if tuning else name
    return TaskData(
        name,
        tuple(label for part in parts for label in part.labels),
        written(folder / f"{stem}.train.jsonl", train),
        written(folder / f"{stem}.test.jsonl", test),
    )


def _short(parts: Sequence[Part]) -> str:
    return "-".join(part.name.partition("_")[0] for part in parts)


def _part(
    name: str,
    labels: Sequence[str],
    known: Sequence[str],
    rows: Mapping[Split, Sequence[Mapping[str, Any]]],
    indices: Iterable[int],
) -> Part:
    own = set(indices)
    kept = {
        split: tuple(
            {"text": row["text"], "label": f"{name}: {known[row['label']]}"}
            for row in found
            if row["label"] in own
        )
        for split, found in rows.items()
    }
    return Part(name, tuple(f"{name}: {label}" for label in labels), kept)


def _even(part: Part, split: Split, count: int) -> Iterator[Mapping[str, Any]]:
    """Yield the first rows of each label, as many of each, ``count`` at most together."""
    left = dict.fromkeys(part.labels, count // len(part.labels))
    for row in part.rows[split]:
        if left[row["label"]]:
            left[row["label"]] -= 1
            yield row


def _held_back(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return rows to train on and to measure by, one in :data:`HELD_EVERY` of each label."""
    seen: dict[str, int] = {}
    fit: list[Mapping[str, Any]] = []
    held: list[Mapping[str, Any]] = []
    for row in rows:
        number = seen[row["label"]] = seen.get(row["label"], 0) + 1
        (fit if number % HELD_EVERY else held).append(row)
    return fit, held


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, packed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
