"""What a merge sums: the weighted low-rank products of several adapters, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, NotLowRank, lora_layers, lora_tensors


class BadMerge(ValueError):
    """These adapters cannot be merged this way."""


class Measured(dict[str, Tensor]):
    """The tensors of a merge that measures what it loses.

    Attributes:
        metrics: told with the version that is made of it, and not part of it.
    """

    def __init__(self, tensors: Tensors, metrics: Mapping[str, float]) -> None:
        super().__init__(tensors)
        self.metrics = dict(metrics)


class Term(NamedTuple):
    """One adapter's share in one layer of a merge: ``weight * scaling * b @ a``.

    Attributes:
        adapter: index of the adapter, from 0.
        weight: finite, not 0.
        factors: the adapter's layer.
    """

    adapter: int
    weight: float
    factors: Factors


def merge_terms(adapters: Sequence[Tensors], weights: Sequence[float]) -> dict[str, list[Term]]:
    """Return what is to be summed in every layer, by layer name, sorted.

    Adapters of weight 0 are left out. A layer that an adapter has not is a zero product there.

    Raises:
        BadMerge: if there is nothing to merge, the weights do not fit, an adapter has tensors
            that are not of a low-rank layer, or a layer's shapes differ between adapters.
    """
    if len(adapters) != len(weights):
        raise BadMerge(
            f"{len(adapters)} adapters and {len(weights)} weights; give one for each adapter"
        )
    for index, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise BadMerge(f"weight {index} is {weight}; weights must be finite")
    if not any(weights):
        raise BadMerge("nothing to merge; give at least one adapter whose weight is not 0")
    layers: dict[str, list[Term]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if weight != 0:
            for name, factors in _only_low_rank(adapter, index).items():
                layers.setdefault(name, []).append(Term(index, float(weight), factors))
    for name, terms in layers.items():
        _check_same_base(name, terms)
    return dict(sorted(layers.items()))


def _only_low_rank(adapter: Tensors, index: int) -> dict[str, Factors]:
    """Return the layers of ``adapter``; raise BadMerge if it has anything else."""
    try:
        layers = lora_layers(adapter)
    except NotLowRank as error:
        raise BadMerge(f"adapter {index} cannot be merged: {error}") from error
    others = sorted(adapter.keys() - lora_tensors(layers).keys())
    if others:
        raise BadMerge(
            f"adapter {index} has {others[0]!r}, which is no part of a low-rank layer; merges take "
            "lora_A, lora_B and scaling only, and heads are merged apart, by task"
        )
    return layers


def _check_same_base(layer: str, terms: Sequence[Term]) -> None:
    """Raise BadMerge unless the products of ``terms`` have one shape."""
    shapes = {(t.factors.b.shape[0], t.factors.a.shape[1]): t.adapter for t in reversed(terms)}
    if len(shapes) > 1:
        text = ", ".join(f"{list(shape)} in adapter {n}" for shape, n in reversed(shapes.items()))
        raise BadMerge(
            f"layer {layer!r} is {text}: they belong to different base models; merge adapters of "
            "one base model"
        )


def stack(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Return the exact weighted sum of a layer's products as one pair of factors, in float64.

    Returns:
        ``b``, ``[out, sum of ranks]``, which holds the weights and scalings, and ``a``,
        ``[sum of ranks, in]``.
    """
    b = [t.factors.b.to(torch.float64).T * (t.weight * t.factors.scaling.item()) for t in terms]
    a = [t.factors.a.to(torch.float64) for t in terms]
    return torch.cat(b).T, torch.cat(a)


def merged_factors(b: Tensor, a: Tensor, terms: Sequence[Term]) -> Factors:
    """Return float64 factors of scaling 1 in the widest dtype of ``terms``."""
    dtype = terms[0].factors.a.dtype
    for tensor in (t for term in terms for t in (term.factors.a, term.factors.b)):
        dtype = torch.promote_types(dtype, tensor.dtype)
    one = terms[0].factors.scaling.new_ones(())
    return Factors(a.to(dtype).contiguous(), b.to(dtype).contiguous(), one)
