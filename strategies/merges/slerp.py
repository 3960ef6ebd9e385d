"""SLERP: the middle of the adapters' directions on the sphere, at the mean of their lengths.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, for models in
mergekit, arXiv 2403.13257; for more than two, the weighted mean on the sphere of Buss and Fillmore
(ACM Trans. Graph. 20(2), 2001), which is the same for two. Here it is of products, by their inner
products: the result lies in their span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.energy import product_inner
from strategies.plugins import Range
from strategies.products import Best, best, captured
from strategies.tensors import lora_tensors
from strategies.terms import BadMerge, Measured, Term, merge_terms, merged_factors, stack

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "ratios"
_ITERATIONS, _DONE = 200, 1e-14
_OPPOSITE = 1e-9  # of a sum of unit vectors: they cancel


def slerp(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    scope: Literal["layer", "model"] = "layer",
    rank: Annotated[int | None, Range(1)] = None,
) -> Measured:
    """Turn from one adapter's product to another's, by angle and by length.

    Where a plain mean of unrelated adapters is shorter than each, this is not. Two adapters with
    weights 1 - t and t are the classical SLERP at t, with the length interpolated apart.
    O((out + in) R²) for a sum of ranks R; never forms the out x in product.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: how near to each; only their ratios matter. A negative one is the negated adapter.
        scope: whether each ``layer`` turns by itself, or the ``model`` as one vector.
        rank: largest rank to keep, >= 1; without it all, at most the sum of the adapters' ranks.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of the result ``rank`` keeps; 1 without it.

    Raises:
        BadMerge: if directions are opposite, so that none is between them, or the adapters do not
            fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    grams = {name: _gram(terms, len(adapters)) for name, terms in layers.items()}
    if scope == "model":
        whole = torch.stack(list(grams.values())).sum(0)
        grams = dict.fromkeys(grams, whole)
    found: dict[str, Best] = {}
    for name, terms in layers.items():
        factors = _coefficients(grams[name], torch.tensor(weights, dtype=torch.float64))
        turned = [t._replace(weight=float(factors[t.adapter])) for t in terms]
        b, a = stack(turned)
        found[name] = best(b, a, min(len(a), *b.shape, a.shape[1], rank or len(a)))
    made = {
        n: merged_factors(one.b, one.a[: one.b.shape[1]], layers[n]) for n, one in found.items()
    }
    return Measured(lora_tensors(made), captured(found, dict.fromkeys(found, torch.tensor(1.0))))


def _gram(terms: Sequence[Term], adapters: int) -> Tensor:
    """Return the inner products of the products, ``[adapters, adapters]``, without weights."""
    gram = torch.zeros(adapters, adapters, dtype=torch.float64)
    parts = [
        (t.factors.b.double() * t.factors.scaling.item(), t.factors.a.double(), t.adapter)
        for t in terms
    ]
    for b, a, row in parts:
        for other_b, other_a, column in parts:
            gram[row, column] = product_inner(b, a, other_b, other_a)
    return gram


def _coefficients(gram: Tensor, weights: Tensor) -> Tensor:
    """Return by what to multiply each product, so that their sum is the point between them.

    Raises:
        BadMerge: if they cancel.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = float((norms * weights.abs()).sum() / weights.abs().sum())
    moves = (norms > 0) & (weights != 0)
    if not moves.any():
        return torch.zeros_like(weights)
    units = torch.where(moves, weights.sign() / torch.where(moves, norms, 1.0), 0.0)
    shares = torch.where(moves, weights.abs(), 0.0)
    shares = shares / shares.sum()
    cosines = units[:, None] * gram * units  # of the unit vectors
    point = shares
    for _ in range(_ITERATIONS):
        size = (point @ cosines @ point).clamp(min=0).sqrt()
        if size < _OPPOSITE:
            raise BadMerge(
                "slerp needs directions that have one between them, and these cancel; merge with "
                "task-arithmetic, or give other weights"
            )
        point = point / size
        near = (cosines @ point).clamp(-1, 1)
        angles = torch.acos(near)
        stretch = torch.where(angles > 1e-7, angles / torch.sin(angles).clamp(min=1e-12), 1.0)
        step = shares * stretch  # the logarithms' mean is a sum of units less a part of the point
        tangent = step - point * float((step * near).sum())
        size = (tangent @ cosines @ tangent).clamp(min=0).sqrt()
        if size < _DONE:
            break
        point = point * torch.cos(size) + tangent * (torch.sin(size) / size)
    size = (point @ cosines @ point).clamp(min=0).sqrt()
    return units * (point / size) * length
