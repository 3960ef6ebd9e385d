"""DARE in place of TIES's trimming, then TIES's election of signs.

Source: arXiv 2311.03099 and, for the election, TIES-Merging, arXiv 2306.01708. On the products, and
not on the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from torch import Tensor

from strategies.base import Tensors
from strategies.dropping import dropped
from strategies.entrywise import Rows, elected, merged_entrywise
from strategies.plugins import Range
from strategies.terms import Measured, merge_terms

MEAN_OPTIONS: Mapping[str, Any] = {"density": 1.0}
WEIGHTS = "sums"


def dare_ties(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, open_low=True)] = 0.5,
    seed: Annotated[int, Range(0)] = 0,
    rank: Annotated[int | None, Range(1)] = None,
    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None,
) -> Measured:
    """Drop entries at random, elect a sign for each, sum those that have it; cut to a rank.

    A sum and not a mean, as in mergekit: the entries that are left have grown for those that are
    gone, and a mean would count both. Forms the product of every layer, a block of rows at a time;
    see :func:`strategies.entrywise.merged_entrywise` for what it costs.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: how much each adapter counts, in the election and in the sum.
        density: with what probability an entry is kept, in (0, 1]; it is divided by it.
        seed: of what is dropped; the same seed drops the same entries of the same adapter.
        rank: largest rank to keep, >= 1. Without ``rank`` and ``energy``, the sum of the adapters'
            ranks in the layer.
        energy: keep the smallest rank with at least this share of the squared norm, in (0, 1].

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of what was elected it keeps, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    return merged_entrywise(layers, partial(_agreed, density=density, seed=seed), rank, energy)


def _agreed(rows: Rows, density: float, seed: int) -> Tensor:
    weighted = dropped(rows, density, seed) * rows.weights
    return elected(weighted, rows.weights, normalize=False)
