"""The weighted sum of the products, cut to a rank by its singular value decomposition.

Source: as a server step this is FlexLoRA's, arXiv 2402.11505, there with the dense product. That
the cut is the nearest of its rank is the theorem of Eckart and Young.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.products import best, captured
from strategies.tensors import lora_tensors
from strategies.terms import Measured, merge_terms, merged_factors, stack

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "sums"


def svd(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    rank: Annotated[int | None, Range(1)] = None,
    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None,
) -> Measured:
    """Sum the adapters' products and keep the largest singular values of every layer.

    The nearest adapter of its rank to the exact sum, in the Frobenius norm; exact where the rank
    suffices. The result has orthonormal rows of A and scaling 1, so that FedSVD can go on from it.
    O((out + in) R²) for a sum of ranks R; never forms the out x in product.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; they need not sum to 1.
        rank: largest rank to keep, >= 1. Without ``rank`` and ``energy``, the largest rank that an
            adapter has in the layer.
        energy: keep the smallest rank with at least this share of the sum of squared singular
            values of the layer, in (0, 1]; 1 keeps all that is not zero. With ``rank``, the
            smaller of the two.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of the exact sum it keeps, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    merged, found = {}, {}
    for name, terms in merge_terms(adapters, weights).items():
        largest = max(term.factors.a.shape[0] for term in terms)
        limit = rank or (largest if energy is None else None)
        one = best(*stack(terms), partial(_rank_to_keep, limit=limit, energy=energy))
        merged[name], found[name] = merged_factors(one.b, one.a, terms), one
    ones = {name: torch.tensor(1.0) for name in found}
    return Measured(lora_tensors(merged), captured(found, ones))


def _rank_to_keep(singular_values: Tensor, limit: int | None, energy: float | None) -> int:
    """Return the smallest rank, >= 1, with a share ``energy`` of the squares, at most ``limit``."""
    rank = singular_values.numel()
    if energy is not None:
        kept = singular_values.square().cumsum(0)  # descending, so the largest come first
        rank = int((kept < energy * kept[-1]).sum()) + 1
    return rank if limit is None else min(rank, limit)
