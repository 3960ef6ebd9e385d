"""Concatenation: the exact weighted sum of the products, at the sum of the ranks.

Source: exact stacking of factors, arXiv 2409.05976.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import lora_tensors
from strategies.terms import merge_terms, merged_factors, stack

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "sums"


def cat(adapters: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum the adapters' products exactly, by stacking their factors.

    The product of every layer is ``sum weights[i] * scaling_i * B_i @ A_i``, whatever the ranks,
    scalings and row spaces; its rank is the sum of the ranks, its scaling 1. A layer that an
    adapter has not counts as zero there. A weight of -1 negates, 0 leaves out.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; they need not sum to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    return lora_tensors(
        {name: merged_factors(*stack(terms), terms) for name, terms in layers.items()}
    )
