"""Task arithmetic: task vectors are added and subtracted, exactly, at the rank that this needs.

Source: arXiv 2212.04089. A negative weight unlearns by negation: what that task changed is taken
away again. Where directions cancel the rank falls, which ``cat`` leaves as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.products import best
from strategies.tensors import lora_tensors
from strategies.terms import merge_terms, merged_factors, stack

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "sums"
_ROUNDING = 1e-6  # relative, of singular values of float32 factors


def task_arithmetic(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    scale: Annotated[float, Range(0, open_low=True)] = 1.0,
) -> dict[str, Tensor]:
    """Add and subtract the adapters' products exactly, at the smallest rank that holds the result.

    The product of every layer is ``scale * sum weights[i] * scaling_i * B_i @ A_i``. Its rows of A
    are orthonormal and its scaling 1. O((out + in) R²) for a sum of ranks R.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; -1 takes away what it changed.
        scale: what the sum is multiplied by, > 0; the paper's lambda, the same for all tasks.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    merged = {}
    for name, terms in merge_terms(adapters, weights).items():
        found = best(*stack(terms), _needed)
        merged[name] = merged_factors(found.b * scale, found.a, terms)
    return lora_tensors(merged)


def _needed(singular_values: Tensor) -> int:
    """Return how many are more than rounding, at least 1."""
    return max(1, int((singular_values > singular_values[:1] * _ROUNDING).sum()))
