"""TIES: trim each adapter, elect a sign for every entry, and take the mean of those that have it.

Source: TIES-Merging, arXiv 2306.01708. On the products, as in the paper, and not on the factors as
PEFT's ``ties`` is: a factor's entries are no parameters of the model, and change with its gauge.
Signs are elected by the weighted sum, as in mergekit. An entry whose votes cancel is 0 here; the
authors' code gives it the sign of most others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from torch import Tensor

from strategies.base import Tensors
from strategies.entrywise import Rows, Scope, elected, least_kept, merged_entrywise, trimmed
from strategies.plugins import Range
from strategies.terms import Measured, merge_terms

MEAN_OPTIONS: Mapping[str, Any] = {"density": 1.0}
WEIGHTS = "ratios"


def ties(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, open_low=True)] = 0.2,
    scope: Scope = "model",
    scale: Annotated[float, Range(0, open_low=True)] = 1.0,
    rank: Annotated[int | None, Range(1)] = None,
) -> Measured:
    """Take of every entry the mean of the adapters that agree in sign; cut the result to a rank.

    Forms the product of every layer, a block of rows at a time; see
    :func:`strategies.entrywise.merged_entrywise` for what it costs.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: how much each adapter counts, in the election and in the mean; a negative one
            counts the negated adapter. Only their ratios matter.
        density: share of an adapter's entries that are kept before the election, in (0, 1].
        scope: ``model`` keeps that share of all layers together, as the paper does, ``layer`` of
            each, as PEFT and mergekit do.
        scale: what the result is multiplied by, > 0; the paper's lambda.
        rank: largest rank to keep, >= 1; without it the sum of the adapters' ranks in the layer.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of TIES's product it keeps, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    least = least_kept(layers, density, scope)
    return merged_entrywise(layers, partial(_agreed, least=least, scale=scale), rank)


def _agreed(rows: Rows, least: Mapping[tuple[str, int], float], scale: float) -> Tensor:
    weighted = trimmed(rows, least) * rows.weights
    return elected(weighted, rows.weights, normalize=True) * scale
