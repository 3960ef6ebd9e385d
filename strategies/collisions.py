"""In how many entries of the base weights tasks collide: both change them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors
from strategies.terms import merge_terms

_ENTRIES = 2**22  # of a product that are in memory at once


def collision_rate(
    adapters: Sequence[Tensors], weights: Sequence[float] | None = None, threshold: float = 0.0
) -> dict[str, float]:
    """Return the share of entries of the base weights that more than one adapter changes.

    Of two adapters it is N-LoRA's collision rate (2410.10179, section 3). A product is dense but
    for exact zeros: without a penalty or a mask, and with a ``threshold`` of 0, it is 1.

    Args:
        adapters: at least two, plain low-rank ones of one base model.
        weights: of each, such as for a merge; 1 for each by default.
        threshold: what an entry must change by at least to count, in units of the root mean square
            of that adapter's change of the layer, >= 0; with 0 every entry counts that is not 0.

    Returns:
        ``collision_rate`` over all layers that any of them has, and ``collision_rate/LAYER``.

    Raises:
        strategies.terms.BadMerge: if the adapters do not fit each other.
    """
    layers = merge_terms(adapters, weights or [1.0] * len(adapters))
    counts = {}
    for name, terms in layers.items():
        parts = [term.factors for term in terms]
        counts[name] = _collided(parts, threshold), len(parts[0].b) * parts[0].a.shape[1]
    hit, every = (sum(one[i] for one in counts.values()) for i in (0, 1))
    return {"collision_rate": hit / every} | {
        f"collision_rate/{name}": one / size for name, (one, size) in counts.items()
    }


def _collided(parts: Sequence[Factors], threshold: float) -> int:
    """Return how many entries of a layer at least two of its products change."""
    least = [threshold * _root_mean_square(one) for one in parts]
    out, found = len(parts[0].b), 0
    step = max(1, _ENTRIES // parts[0].a.shape[1])
    for start in range(0, out, step):
        rows = slice(start, start + step)
        changes = [_rows(one, rows).abs() for one in parts]
        seen = torch.stack(
            [(c > 0) & (c >= bound) for c, bound in zip(changes, least, strict=True)]
        )
        found += int((seen.sum(0) > 1).sum())
    return found


def _rows(factors: Factors, rows: slice) -> Tensor:
    product: Tensor = factors.scaling.double() * factors.b[rows].double() @ factors.a.double()
    return product


def _root_mean_square(factors: Factors) -> float:
    b, a = factors.b.double(), factors.a.double()
    squares = float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0)) * float(factors.scaling) ** 2
    return math.sqrt(squares / (len(b) * a.shape[1]))
