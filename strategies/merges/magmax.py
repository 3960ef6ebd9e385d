"""Of every entry of the weights, the change that is largest of all adapters' (MagMax).

Source: MagMax, arXiv 2407.06322: tasks are learned one after the other, each from where the last
one ended, and of all that they changed since the beginning the largest entries are kept.

Which entries are kept is a choice in the products, and its result has no low rank. The papers'
models are dense; here the chosen product is formed by blocks of rows and cut to the nearest adapter
of a rank, and how much of it that keeps is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.entrywise import Rows, merged_entrywise
from strategies.plugins import Range
from strategies.terms import Measured, merge_terms

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "ratios"


def magmax(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    rank: Annotated[int | None, Range(1)] = None,
    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None,
    scale: Annotated[float, Range(0, open_low=True)] = 1.0,
) -> Measured:
    """Keep of every entry the adapters' largest change; cut the result to a rank.

    Of two changes of the same size and opposite signs the positive one counts. For versions that go
    on from one another (``start: continue``), each of which holds all that was changed since the
    base model. Forms the product of every layer, a block of rows at a time; see
    :func:`strategies.entrywise.merged_entrywise` for what it costs.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: what each adapter's changes are multiplied by before the largest is chosen; the
            result is divided by the largest of the weights, so that only their ratios count.
        rank: largest rank to keep, >= 1. Without ``rank`` and ``energy``, the sum of the adapters'
            ranks in the layer.
        energy: keep the smallest rank with at least this share of the squared norm of the chosen
            product of the layer, in (0, 1]. With ``rank``, the smaller of the two.
        scale: what the result is multiplied by, > 0; the paper's lambda.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of the chosen product it keeps, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    factor = scale / max(abs(w) for w in weights)
    return merged_entrywise(layers, partial(_largest, factor=factor), rank, energy)


def _largest(rows: Rows, factor: float) -> Tensor:
    changes = rows.values * rows.weights
    highest, lowest = changes.amax(0), changes.amin(0)
    return torch.where(highest >= -lowest, highest, lowest) * factor
