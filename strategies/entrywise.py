"""Merges that choose entry by entry in the products, cut to the nearest adapter of a rank.

What is chosen entry by entry has no low rank. The products are formed a block of rows at a time,
as often as they are needed, and never whole; the nearest product of a rank is found from the
smaller Gram matrix where that is small, and else by a randomised subspace iteration (arXiv
0909.4061, algorithm 4.4, on the Gram matrix, so that each pass over the blocks is a whole
iteration). How much of the chosen product a rank keeps is measured, not estimated. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from strategies.products import Best, captured
from strategies.tensors import lora_tensors
from strategies.terms import Measured, Term, merged_factors

Scope: TypeAlias = Literal["layer", "model"]
"""Of which entries a share is kept: of each layer's, or of all layers' together."""

Place: TypeAlias = tuple[str, int]
"""A layer's name and an adapter's number."""

_ENTRIES = 2**20  # of each product that are in memory at once: 8 MB in float64
_ROUNDING = 1e-13  # relative, of eigenvalues that are squares of float32 values
_GRAM = 1024  # the largest Gram matrix that is decomposed where a rank is asked for
_SPARE, _PASSES = 16, 3  # directions beyond the rank, and iterations to find them
_HALF = 16  # of a float32's bits


class Rows(NamedTuple):
    """The same rows of every adapter's product in one layer.

    Attributes:
        layer: its name.
        terms: the adapters.
        start: the first row, counted along the longer side of the layer.
        values: ``[terms, rows, width]``, float64, with scalings, without weights.
        weights: ``[terms, 1, 1]``, float64.
    """

    layer: str
    terms: Sequence[Term]
    start: int
    values: Tensor
    weights: Tensor


Choose: TypeAlias = Callable[[Rows], Tensor]
"""From the rows of all products, those of the merge: ``[rows, width]``."""


def merged_entrywise(
    layers: Mapping[str, Sequence[Term]],
    choose: Choose,
    rank: int | None = None,
    energy: float | None = None,
) -> Measured:
    """Return the adapter nearest to what is chosen.

    Needs ``min(out, in)²`` numbers of memory where that is at most 1024² or no rank is asked for,
    and else those of a block; and ``(out + in) (rank + 16)`` besides, of the rank that is kept.

    Args:
        layers: as :func:`strategies.terms.merge_terms` returns them.
        choose: pure; asked for the same rows several times.
        rank: the most that a layer keeps, >= 1. Without ``rank`` and ``energy``, the sum of the
            adapters' ranks in the layer.
        energy: keep the smallest rank with at least this share of the squared norm of the chosen
            product, in (0, 1]. With ``rank``, the smaller of the two.

    Returns:
        The adapter, of scaling 1; its metrics ``captured_energy`` and ``captured_energy/LAYER``
        say how much of the squared norm of what was chosen it keeps, 0 to 1.
    """
    found = {}
    for name, terms in layers.items():
        limit = rank or (sum(len(t.factors.a) for t in terms) if energy is None else None)
        found[name] = _nearest(name, terms, choose, limit, energy)
    ones = {name: torch.tensor(1.0) for name in found}
    made = {name: merged_factors(one.b, one.a, layers[name]) for name, one in found.items()}
    return Measured(lora_tensors(made), captured(found, ones))


def least_kept(
    layers: Mapping[str, Sequence[Term]], density: float, scope: Scope
) -> dict[Place, float]:
    """Return the magnitude from which on entries are among the largest of an adapter's product.

    As :func:`smallest_kept`, by blocks of rows. Weights take no part.

    Args:
        layers: as :func:`strategies.terms.merge_terms` returns them.
        density: the share to keep, in (0, 1].
        scope: of which entries.
    """
    places = [(name, term.adapter) for name, terms in layers.items() for term in terms]

    def entries() -> Iterator[tuple[Place, Tensor]]:
        for name, terms in layers.items():
            for rows in _rows(name, terms):
                for term, values in zip(terms, rows.values, strict=True):
                    yield (name, term.adapter), values

    return _least(places, entries, density, scope)


def smallest_kept(
    values: Mapping[Place, Tensor], density: float, scope: Scope
) -> dict[Place, float]:
    """Return the magnitude from which on entries are among the largest of an adapter.

    Exact to float32, in two passes and 256 KiB for each adapter (and layer, where that is the
    scope): entries are counted by the upper half of their bits, and those of the half in which the
    wanted one lies by the lower. Entries of the same size are kept or left out together.

    Args:
        values: by layer and number of the adapter.
        density: the share to keep, in (0, 1]; at least one entry.
        scope: of which entries.

    Returns:
        By layer and number of the adapter; 0 keeps everything.
    """
    return _least(list(values), lambda: iter(values.items()), density, scope)


def _least(
    places: Sequence[Place],
    entries: Callable[[], Iterator[tuple[Place, Tensor]]],
    density: float,
    scope: Scope,
) -> dict[Place, float]:
    if density >= 1:
        return dict.fromkeys(places, 0.0)
    groups = {place: place if scope == "layer" else ("", place[1]) for place in places}
    upper: dict[Place, int] = {}
    wanted: dict[Place, int] = {}
    for group, counts in _counts(entries(), groups, upper).items():
        number = max(1, round(density * int(counts.sum())))
        upper[group], wanted[group] = _bin(counts, number)
    least = {}
    for group, counts in _counts(entries(), groups, upper).items():
        bits = (upper[group] << _HALF) + _bin(counts, wanted[group])[0]
        least[group] = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    return {place: least[group] for place, group in groups.items()}


def trimmed(rows: Rows, least: Mapping[Place, float]) -> Tensor:
    """Return ``rows.values`` without what is smaller than :func:`least_kept` says."""
    bounds = torch.tensor([least[rows.layer, term.adapter] for term in rows.terms])
    return torch.where(rows.values.abs().float() >= bounds[:, None, None], rows.values, 0.0)


def elected(weighted: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Return TIES's last two steps: of every entry, those that have the sign of the sum.

    An entry whose votes cancel is 0.

    Args:
        weighted: ``[terms, rows, width]``, with weights; a zero has no vote.
        weights: ``[terms, 1, 1]``.
        normalize: whether to divide by the sum of the magnitudes of the weights that agree.
    """
    agrees = weighted * weighted.sum(0).sign() > 0
    total = torch.where(agrees, weighted, 0.0).sum(0)
    if not normalize:
        return total
    counted = torch.where(agrees, weights.abs(), 0.0).sum(0)
    return torch.where(counted > 0, total / counted, 0.0)


def _counts(
    entries: Iterator[tuple[Place, Tensor]],
    groups: Mapping[Place, Place],
    upper: Mapping[Place, int],
) -> dict[Place, Tensor]:
    """Count entries by the upper half of their bits, or by the lower where the upper is given."""
    found = {group: torch.zeros(2**_HALF, dtype=torch.int64) for group in groups.values()}
    for place, values in entries:
        group = groups[place]
        bits = values.abs().float().flatten().view(torch.int32)
        if group in upper:
            bits = bits[bits >> _HALF == upper[group]] & (2**_HALF - 1)
        else:
            bits = bits >> _HALF
        found[group] += torch.bincount(bits, minlength=2**_HALF)
    return found


def _bin(counts: Tensor, number: int) -> tuple[int, int]:
    """Return the bin of the ``number``-th largest, and which of that bin's it is, from 1."""
    above = counts.flip(0).cumsum(0)
    place = int((above < number).sum())
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, number - before


def _rows(name: str, terms: Sequence[Term]) -> Iterator[Rows]:
    """Yield blocks of rows of the products, or of their transposes where these are taller."""
    wide = terms[0].factors.a.shape[1] > len(terms[0].factors.b)
    pairs = []
    for term in terms:
        b = term.factors.b.double() * term.factors.scaling.item()
        a = term.factors.a.double()
        pairs.append((a.T, b.T) if wide else (b, a))
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64)[:, None, None]
    height, width = len(pairs[0][0]), pairs[0][1].shape[1]
    step = max(1, _ENTRIES // width)
    for start in range(0, height, step):
        values = torch.stack([left[start : start + step] @ right for left, right in pairs])
        yield Rows(name, terms, start, values, weights)


def _nearest(
    name: str, terms: Sequence[Term], choose: Choose, limit: int | None, energy: float | None
) -> Best:
    """Return the nearest product of what is chosen."""
    sides = len(terms[0].factors.b), terms[0].factors.a.shape[1]
    side = min(sides)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for rows in _rows(name, terms):
            block = choose(rows)
            yield slice(rows.start, rows.start + len(block)), block

    if limit is None or side <= max(_GRAM, limit + _SPARE):
        gram = torch.zeros(side, side, dtype=torch.float64)
        for _, block in blocks():
            gram += block.T @ block
        squares, directions = (t.flip(-1) for t in torch.linalg.eigh(gram))
        wanted = _number(squares.clamp(min=0), float(gram.trace()), limit, energy)
        directions = directions[:, : min(side, wanted + 1)]  # one more than rounding can ask for
    else:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(side, limit + _SPARE, generator=generator, dtype=torch.float64)
        for _ in range(_PASSES):
            directions = torch.linalg.qr(_times_gram(blocks, directions)).Q
    image = torch.zeros(max(sides), directions.shape[1], dtype=torch.float64)
    total = 0.0
    for rows, block in blocks():
        image[rows] = block @ directions
        total += float(block.square().sum())
    u, s, vh = torch.linalg.svd(image, full_matrices=False)
    keep = _number(s.square(), total, limit, energy)
    b, a = u[:, :keep] * s[:keep], vh[:keep] @ directions.T
    peaks = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0)
    b, a = b * signs.T, a * signs
    kept = min(float(s[:keep].square().sum()), total)
    if sides[1] > sides[0]:
        norms = s[:keep].clamp(min=torch.finfo(s.dtype).tiny)
        b, a = a.T * s[:keep], b.T / norms[:, None]
    return Best(b, a, kept, total)


def _times_gram(blocks: Callable[[], Iterator[tuple[slice, Tensor]]], right: Tensor) -> Tensor:
    """Return the Gram matrix of the chosen product's columns times ``right``, in one pass."""
    total = torch.zeros_like(right)
    for _, block in blocks():
        total += block.T @ (block @ right)
    return total


def _number(squares: Tensor, total: float, limit: int | None, energy: float | None) -> int:
    """Return how many of the squared singular values, descending, to keep; at least 1."""
    keep = int((squares > squares[0] * _ROUNDING).sum())
    if energy is not None:
        keep = min(keep, int((squares.cumsum(0) < energy * total).sum()) + 1)
    return max(1, keep if limit is None else min(keep, limit))
