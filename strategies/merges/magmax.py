"""Of every entry of the weights, the change that is largest of all adapters' (MagMax).

Source: MagMax, arXiv 2407.06322: tasks are learned one after the other, each from where the last
one ended, and of all that they changed since the beginning the largest entries are kept.

Which entries are kept is a choice in the products, and its result has no low rank. The papers'
models are dense; here the chosen product is formed by blocks of rows and cut to the nearest adapter
of a rank, and how much of it that keeps is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.tensors import lora_tensors
from strategies.terms import Measured, Term, merge_terms, merged_factors

MEAN_OPTIONS: Mapping[str, Any] = {}
_ENTRIES = 2**20  # of each product that are in memory at once: 8 MB in float64
_ROUNDING = 1e-13  # relative, of eigenvalues that are squares of float32 values


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
    base model. Forms the product of every layer, a block of rows at a time: O(out in min(out, in))
    operations and min(out, in)² numbers of memory.

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
    merged, kept, total = {}, {}, {}
    for name, terms in layers.items():
        limit = rank or (sum(len(t.factors.a) for t in terms) if energy is None else None)
        b, a, squares = _nearest(terms, limit, energy)
        merged[name] = merged_factors(b * factor, a, terms)
        kept[name], total[name] = float(squares[: len(a)].sum()), float(squares.sum())
    shares = {f"captured_energy/{n}": _share(kept[n], total[n]) for n in kept}
    every = _share(sum(kept.values()), sum(total.values()))
    return Measured(lora_tensors(merged), {"captured_energy": every, **shares})


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def _nearest(
    terms: Sequence[Term], limit: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest ``b @ a`` to the chosen product, and its squared singular values.

    From the eigenvectors of the smaller Gram matrix, on which the product is projected.
    """
    out, width = len(terms[0].factors.b), terms[0].factors.a.shape[1]
    wide = width > out
    side = min(out, width)
    gram = torch.zeros(side, side, dtype=torch.float64)
    for _, block in _chosen(terms, wide):
        gram += block.T @ block
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    keep = int((squares > squares[0] * _ROUNDING).sum())
    if energy is not None:
        reached = squares.cumsum(0)
        keep = min(keep, int((reached < energy * reached[-1]).sum()) + 1)
    keep = max(1, keep if limit is None else min(keep, limit))
    basis = vectors[:, :keep]
    image = torch.zeros(max(out, width), keep, dtype=torch.float64)
    for rows, block in _chosen(terms, wide):
        image[rows] = block @ basis
    return (basis, image.T, squares) if wide else (image, basis.T, squares)


def _chosen(terms: Sequence[Term], transposed: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of the product of the largest entries, or of its transpose, float64."""
    pairs = []
    for term in terms:
        b = term.factors.b.double() * (term.weight * term.factors.scaling.item())
        a = term.factors.a.double()
        pairs.append((a.T, b.T) if transposed else (b, a))
    step = max(1, _ENTRIES // pairs[0][1].shape[1])
    for start in range(0, len(pairs[0][0]), step):
        rows = slice(start, start + step)
        highest = lowest = pairs[0][0][rows] @ pairs[0][1]
        for left, right in pairs[1:]:
            product = left[rows] @ right
            highest, lowest = highest.maximum(product), lowest.minimum(product)
        yield rows, torch.where(highest >= -lowest, highest, lowest)
