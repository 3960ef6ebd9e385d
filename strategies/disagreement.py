"""Where adapters that are to be merged work against each other, layer by layer.

A product is never formed whole: signs are counted in blocks of its rows, and subspaces are compared
by the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from strategies.base import Tensors
from strategies.comparison import compare_layers
from strategies.terms import Term, merge_terms

_BLOCK = 1 << 20
"""Entries of a product that are looked at at once."""


@dataclass(frozen=True, slots=True)
class LayerConflict:
    """How far the weighted products of one layer work against each other.

    Attributes:
        layer: its name.
        adapters: indices of those that have it, from 0.
        disagreement: share of the entries in which two of them have opposite signs, in [0, 1].
        cancelled: share of the entries' sizes that their sum loses, ``1 - Σ|Σx| / ΣΣ|x|``, in
            [0, 1]; 0 where all agree, and for fewer than two.
        input_overlap: mean squared cosine of the principal angles between row spaces, of the pair
            that shares most, in [0, 1]; None for fewer than two.
        output_overlap: the same of the column spaces.
    """

    layer: str
    adapters: tuple[int, ...]
    disagreement: float
    cancelled: float
    input_overlap: float | None
    output_overlap: float | None


def conflicts(adapters: Sequence[Tensors], weights: Sequence[float]) -> list[LayerConflict]:
    """Return where adapters work against each other, by layer, sorted.

    O(out in) a layer in time for each rank, and memory for a million entries at a time.

    Args:
        adapters: low-rank layers alone, as merges take them.
        weights: one for each; a negative one turns an adapter round.

    Raises:
        BadMerge: if they do not fit each other.
    """
    found = []
    for layer, terms in merge_terms(adapters, weights).items():
        disagreement, cancelled = _signs(terms)
        overlaps = [_overlap(layer, one, other) for one, other in combinations(terms, 2)]
        found.append(
            LayerConflict(
                layer,
                tuple(term.adapter for term in terms),
                disagreement,
                cancelled,
                max((inputs for inputs, _ in overlaps), default=None),
                max((outputs for _, outputs in overlaps), default=None),
            )
        )
    return found


def _signs(terms: Sequence[Term]) -> tuple[float, float]:
    """Return the share of entries in which signs differ, and of the sizes that cancel."""
    out_features, in_features = terms[0].factors.b.shape[0], terms[0].factors.a.shape[1]
    rows = max(1, _BLOCK // in_features)
    opposed, summed, sizes = 0, 0.0, 0.0
    for start in range(0, out_features, rows):
        shape = min(rows, out_features - start), in_features
        total, size = torch.zeros(shape), torch.zeros(shape)
        above, below = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        for term in terms:
            scale = term.weight * float(term.factors.scaling)
            part = scale * (term.factors.b[start : start + rows].float() @ term.factors.a.float())
            total += part
            size += part.abs()
            above |= part > 0
            below |= part < 0
        opposed += int((above & below).sum())
        summed += float(total.abs().double().sum())
        sizes += float(size.double().sum())
    cancelled = max(0.0, 1.0 - summed / sizes) if sizes > 0 and len(terms) > 1 else 0.0
    return opposed / (out_features * in_features), cancelled


def _overlap(layer: str, one: Term, other: Term) -> tuple[float, float]:
    """Return the mean squared cosines between two products' row spaces and column spaces."""
    (found,) = compare_layers({layer: one.factors}, {layer: other.factors})
    return _shared(found.input_angles), _shared(found.output_angles)


def _shared(angles: Sequence[float]) -> float:
    """Return the mean squared cosine of angles in degrees; 0 where a space has no direction."""
    if not angles:
        return 0.0
    return float(torch.deg2rad(torch.tensor(angles, dtype=torch.float64)).cos().square().mean())
