"""Of every adapter the largest changes, summed: what is small is taken for noise.

Source: the trimming step of TIES-Merging, arXiv 2306.01708, by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from torch import Tensor

from strategies.base import Tensors
from strategies.entrywise import Rows, Scope, least_kept, merged_entrywise, trimmed
from strategies.plugins import Range
from strategies.terms import Measured, merge_terms

MEAN_OPTIONS: Mapping[str, Any] = {"density": 1.0}
WEIGHTS = "sums"


def magnitude_prune(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, open_low=True)] = 0.2,
    scope: Scope = "model",
    rank: Annotated[int | None, Range(1)] = None,
    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None,
) -> Measured:
    """Sum the largest entries of the adapters' products; cut the result to a rank.

    Forms the product of every layer, a block of rows at a time; see
    :func:`strategies.entrywise.merged_entrywise` for what it costs.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; they take no part in what is kept.
        density: share of an adapter's entries that are kept, in (0, 1]; 1 is the plain sum.
        scope: ``model`` keeps that share of all layers together, ``layer`` of each.
        rank: largest rank to keep, >= 1. Without ``rank`` and ``energy``, the sum of the adapters'
            ranks in the layer.
        energy: keep the smallest rank with at least this share of the squared norm, in (0, 1].

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of the pruned sum it keeps, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    least = least_kept(layers, density, scope)
    return merged_entrywise(layers, partial(_sum, least=least), rank, energy)


def _sum(rows: Rows, least: Mapping[tuple[str, int], float]) -> Tensor:
    return (trimmed(rows, least) * rows.weights).sum(0)
