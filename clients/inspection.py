"""What is in a data set, and what is wrong with it."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.assignment import DataSpec, ModelSpec, Task
from clients.examples import Example
from clients.records import validated
from clients.tags import scheme_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BadLabels(ValueError):
    """This label set is none of the task's."""


def rounded(count: int) -> int:
    """Return a count to two significant digits: an exact size tells that a record was added."""
    scale = int(10 ** max(0, len(str(count)) - 2))
    return max(1, round(count / scale) * scale)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of examples in tokens, before truncation.

    Attributes:
        shortest: the smallest.
        median: the middle one.
        percentile_95: what 95 % do not exceed.
        longest: the largest.
        num_truncated: examples longer than the model's ``max_length``.
    """

    shortest: int
    median: float
    percentile_95: int
    longest: int
    num_truncated: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What is in a data set, and what is wrong with it.

    Attributes:
        total: records, bad ones too.
        num_bad: records that a run would refuse.
        problems: of the first 20 of them, where and what.
        labels: number of good examples by label, or of their words by tag, in index order; empty
            without labels.
        num_duplicates: good examples that repeat an earlier one.
        lengths: None without a tokenizer or without a good example.
    """

    total: int
    num_bad: int
    problems: tuple[str, ...]
    labels: Mapping[str, int]
    num_duplicates: int
    lengths: Lengths | None


def check(
    spec: DataSpec,
    model: ModelSpec | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DataReport:
    """Return what is in the whole data set of ``spec``, whichever labels and shard it selects.

    Bad records are counted, never raised.

    Args:
        spec: the data set.
        model: what the records are for. Without one any record that has a text is good, and labels
            are counted as they are written.
        tokenizer: measures lengths; without a model nothing is truncated.

    Raises:
        BadDataURI, DataNotFound, MissingExtra: as :func:`clients.sources.open_source`.
        BadSelection: for a mapping of a column that weft does not have.
    """
    good: list[Example] = []
    written: list[str] = []
    problems: list[str] = []
    for record in validated(spec, model):
        if record.example is None:
            problems.append(f"{record.place}: {record.problem}")
        else:
            good.append(record.example)
            written.append(record.value)
    return DataReport(
        total=len(good) + len(problems),
        num_bad=len(problems),
        problems=tuple(problems[:20]),
        labels=_label_counts(good, written, model),
        num_duplicates=len(good) - len(set(good)),
        lengths=_lengths(good, tokenizer, model) if tokenizer is not None and good else None,
    )


def inspect(
    spec: DataSpec,
    labels: Sequence[str],
    model: str | None,
    max_length: int,
    task: Task = "classification",
) -> DataReport:
    """Return what is in a data set and what is wrong with it.

    Args:
        spec: the data set.
        labels: the label set; empty to take labels as they are written (classification).
        model: base model whose tokenizer counts lengths, or None.
        max_length: tokens kept of an example.
        task: what the records are for.

    Raises:
        BadDataURI, DataNotFound, MissingExtra, BadSelection: as :func:`check`.
        BadLabels: if the label set is none of the task's.
    """
    if task == "token-classification":
        if not labels:
            raise BadLabels(
                "token-classification needs the declared tags; give --labels O,B-NAME,I-NAME,…"
            )
        if problem := scheme_problem(labels):
            raise BadLabels(problem)
    form = ModelSpec(model or "", task, labels=tuple(labels), max_length=max_length)
    tokenizer = None
    if model is not None:
        from clients import models  # seconds, for a count that nobody asked for

        tokenizer = models.tokenizer(form)
    return check(spec, form if labels or task == "causal-lm" else None, tokenizer)


def _label_counts(
    good: list[Example], written: list[str], model: ModelSpec | None
) -> dict[str, int]:
    if model is None:
        return dict(sorted(Counter(label for label in written if label).items()))
    counts = Counter(e.label for e in good if e.label is not None)
    for example in good:
        counts.update(example.tags)
    return {name: counts[index] for index, name in enumerate(model.labels)}


def _lengths(
    good: list[Example], tokenizer: PreTrainedTokenizerBase, model: ModelSpec | None
) -> Lengths:
    from clients.tokens import encode  # with a tokenizer torch is here already

    limit = sys.maxsize if model is None else model.max_length
    kind = "causal-lm" if model is None else model.kind
    unlimited = ModelSpec(id="", kind=kind, max_length=2**31 - 1)
    lengths = sorted(
        len(encoded.input_ids)
        for start in range(0, len(good), 1000)  # not all tokens of a large data set at once
        for encoded in encode(good[start : start + 1000], tokenizer, unlimited)
    )
    return Lengths(
        shortest=lengths[0],
        median=statistics.median(lengths),
        percentile_95=lengths[round(0.95 * (len(lengths) - 1))],
        longest=lengths[-1],
        num_truncated=sum(length > limit for length in lengths),
    )
