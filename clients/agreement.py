"""Whether a model that was written computes what base model and adapter compute, on a few texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clients import models
from clients.assignment import ModelSpec
from clients.task_model import TaskModel
from clients.tokens import Batch
from strategies.base import Tensors

TEXTS = (
    "the first text of a few words",
    "Another one, which is rather longer: 1, 2, 3 and so on.",
    "model",
    "what does it say about a thing that it has never seen, and why",
)
"""What the check computes logits of."""

_EXACT, _ROUNDED = 1e-4, 0.05


class MergeIsOff(RuntimeError):
    """What was written does not compute what the adapter computes."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a written model agrees with base model and adapter, on :data:`TEXTS`.

    All are norms of differences of logits, relative to the norm of the adapter's.

    Attributes:
        error: of the written model to the adapter.
        effect: of the base model without adapter to it with the adapter.
        tolerance: what ``error`` may be: 1e-4 where all is float32, else 0.05. Where training was
            in float32 it may also not exceed half of ``effect``.
    """

    error: float
    effect: float
    tolerance: float


def agreement(
    written: list[Tensor], adapted: list[Tensor], plain: list[Tensor], spec: ModelSpec, dtype: str
) -> Agreement:
    """Compare logits.

    Args:
        written: of the model that was written.
        adapted: of base model and adapter.
        plain: of the base model alone.
        spec: the base model, as it was trained on.
        dtype: ``fp32`` or ``bf16``, of the written weights.

    Raises:
        MergeIsOff: if the first two are not the same.
    """
    exact = spec.compute_dtype == "float32" and spec.quantization == "none"
    agreed = Agreement(
        error=distance(written, adapted),
        effect=distance(plain, adapted),
        tolerance=_EXACT if exact and dtype == "fp32" else _ROUNDED,
    )
    if not agreed.error <= agreed.tolerance:
        raise MergeIsOff(
            f"the logits of the merged model differ by {agreed.error:.2g} of their norm from those "
            f"of the adapter; at most {agreed.tolerance:g} is rounding, so nothing is left"
        )
    if exact and agreed.error > max(agreed.effect / 2, _EXACT):
        raise MergeIsOff(
            f"rounding to {dtype} changes the logits by {agreed.error:.2g} of their norm, and all "
            f"that the adapter does by {agreed.effect:.2g}; write it with --dtype fp32"
        )
    return agreed


def task_model(model: Any, spec: ModelSpec, head: Tensors) -> TaskModel:
    """Return a base model, adapted or not, with a head in it, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        made = TaskModel(model, spec).eval()
    if head:
        made.write_head(head)
    return made


@torch.no_grad()
def logits_of(model: Any, spec: ModelSpec) -> list[Tensor]:
    """Return the float32 logits of each of :data:`TEXTS`, by itself."""
    tokenizer = models.tokenizer(spec)
    found = []
    for text in TEXTS:
        given = tokenizer(text, truncation=True, max_length=spec.max_length, return_tensors="pt")
        ids, mask = given["input_ids"], given["attention_mask"]
        if isinstance(model, TaskModel):
            logits = model(Batch(ids, mask, torch.zeros(1, dtype=torch.long)))
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits
        found.append(logits.float())
    return found


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the norm of the difference, relative to that of the second."""
    pairs = zip(one, other, strict=True)
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    return apart / math.sqrt(sum(float(b.square().sum()) for b in other))
