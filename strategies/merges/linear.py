"""The weighted sum of the B's over one common A: exact, at the rank of the adapters.

Source: the exact mean of FFA-LoRA, arXiv 2403.12313. PEFT's ``linear`` is something else: it sums
the factors, which adds cross terms, and on a shared A returns n times the mean of n adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, lora_tensors, product_norm
from strategies.terms import BadMerge, Term, merge_terms, merged_factors

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "sums"
ONE_ROW_SPACE: Mapping[str, Any] = {}


def linear(adapters: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum the adapters' B over the A that they share; refuse adapters that share none.

    For adapters of one federated run or family (FFA-LoRA, FedSVD), whose A's are equal or rotations
    of one row space. Every B is first carried over to the A of the adapter of the largest rank (the
    first of these), so the product is ``sum weights[i] * scaling_i * B_i @ A_i`` up to rounding.
    The result has that A and scaling 1.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; they need not sum to 1.

    Raises:
        BadMerge: if the row spaces differ (then ``svd`` or ``cat`` can merge), or the adapters do
            not fit each other or the weights.
    """
    merged = {}
    for name, terms in merge_terms(adapters, weights).items():
        basis = max((term.factors for term in terms), key=lambda factors: factors.a.shape[0])
        moved = [_carried(name, term, basis) for term in terms]
        b = torch.stack(
            [b * (t.weight * t.factors.scaling.item()) for b, t in zip(moved, terms, strict=True)]
        )
        merged[name] = merged_factors(b.sum(dim=0), basis.a, terms)
    return lora_tensors(merged)


def _carried(layer: str, term: Term, basis: Factors) -> Tensor:
    """Return B', in float64, with ``B' @ basis.a = b @ a``.

    Raises:
        BadMerge: if there is none, judged by half the digits of the coarsest dtype: equal row
            spaces that went through many rounds of rounding still agree, unrelated ones never.
    """
    factors = term.factors
    b, a, target = (t.to(torch.float64) for t in (factors.b, factors.a, basis.a))
    if torch.equal(a, target):
        return b
    rotation: Tensor = a @ torch.linalg.pinv(target)
    outside, whole = product_norm(b, a - rotation @ target), product_norm(b, a)
    eps = max(torch.finfo(t.dtype).eps for t in (factors.a, factors.b, basis.a))
    if outside > whole * eps**0.5:
        raise BadMerge(
            f"linear needs adapters that share the row space of lora_A, but at {layer!r} "
            f"{outside / whole:.0%} of the product of adapter {term.adapter} is outside of it; "
            "merge with svd (keeps the rank) or cat (exact, adds the ranks)"
        )
    return b @ rotation
