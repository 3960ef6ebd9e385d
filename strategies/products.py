"""Sums of low-rank products of any rank, in factored form, and what is cut from them.

A client of rank ``r`` sends ``b``, ``[out, r]``, and ``a``, ``[r, in]``. The sum of the products is
one pair of stacked factors as long as its rank is below ``min(out, in)``, and from there on the
matrix itself, which is then the smaller and the cheaper to decompose. Everything is in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from strategies.base import BENEATH, Tensors, Update, beneath
from strategies.tensors import (
    BadUpdate,
    Factors,
    Weighting,
    factored_svd,
    lora_layers,
    lora_tensors,
    product_norm,
    weight_of,
    weighted_mean,
)


class Best(NamedTuple):
    """The best approximation of a product at a rank, in the Frobenius norm (Eckart and Young).

    Attributes:
        b: ``[out, k]``: left singular vectors times singular values, in descending order.
        a: ``[q, in]``, orthonormal rows, ``q >= k``: the product is ``b @ a[:k]``, and the rows
            beyond complete the row space.
        kept: sum of the squared singular values that were kept.
        total: of all of them.
    """

    b: Tensor
    a: Tensor
    kept: float
    total: float


class RunningProduct:
    """A sum of products ``b @ a`` of one layer, term by term, exact but for rounding.

    Memory is at most twice that of the ``[out, in]`` matrix, whatever the number of terms, and that
    matrix is not formed before the summed rank passes ``min(out, in)``: up to there the stacked
    factors cost ``O((out + in) R²)`` to decompose, and the matrix ``O(out in min(out, in))``. The
    Gram matrix of either would be cheaper by a small factor, and loses half of the digits.

    Args:
        out_features: of the layer.
        in_features: of the layer.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self._shape = out_features, in_features
        self._b: list[Tensor] = []
        self._a: list[Tensor] = []
        self._dense: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of :meth:`factors`: the sum of the terms' ranks, at most ``min(out, in)``."""
        whole = min(self._shape)
        return sum(len(a) for a in self._a) if self._dense is None else whole

    @property
    def num_values(self) -> int:
        """How many numbers are kept."""
        parts = [*self._a, *self._b, *([] if self._dense is None else [self._dense])]
        return sum(part.numel() for part in parts)

    def add(self, b: Tensor, a: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * b @ a``; ``b`` is ``[out, rank]`` and ``a`` ``[rank, in]``, any rank."""
        left, right = b.to(torch.float64) * weight, a.to(torch.float64)
        if self._dense is None and self.rank + len(right) > min(self._shape):
            self._dense = left.new_zeros(self._shape)
            for one, other in zip(self._b, self._a, strict=True):
                self._dense.addmm_(one, other)
            self._b, self._a = [], []
        if self._dense is None:
            self._b.append(left)
            self._a.append(right.clone() if right is a else right)
        else:
            self._dense.addmm_(left, right)

    def scale(self, factor: float) -> None:
        """Multiply the sum by ``factor``."""
        self._b = [b * factor for b in self._b]
        if self._dense is not None:
            self._dense.mul_(factor)

    def norm(self) -> float:
        """Return the Frobenius norm of the sum."""
        return product_norm(*self.factors()) if self._dense is None else float(self._dense.norm())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the sum as ``b``, ``[out, rank]``, and ``a``, ``[rank, in]``, exact."""
        out_features, in_features = self._shape
        if self._dense is not None:
            one = torch.eye(min(self._shape), dtype=torch.float64)
            return (one, self._dense) if out_features <= in_features else (self._dense, one)
        b = [torch.zeros(out_features, 0, dtype=torch.float64), *self._b]
        a = [torch.zeros(0, in_features, dtype=torch.float64), *self._a]
        return torch.cat(b, dim=1), torch.cat(a)


def best(b: Tensor, a: Tensor, rank: int | Callable[[Tensor], int] | None = None) -> Best:
    """Return the best approximation of ``b @ a`` at ``rank``; None keeps all that is not zero.

    Args:
        b: ``[out, R]``.
        a: ``[R, in]``.
        rank: how many singular values to keep, or what says so of them, ``[k]``, descending.
    """
    squares = torch.zeros(0, dtype=torch.float64)

    def keep(values: Tensor) -> int:
        nonlocal squares
        squares = values.square()
        if callable(rank):
            return rank(values)
        return int((values > 0).sum()) if rank is None else rank

    u, s, vh = factored_svd(b, a, keep)
    return Best(u * s, vh, float(squares[: s.numel()].sum()), float(squares.sum()))


def product_means(
    updates: Iterable[Update], like: Tensors, weighting: Weighting, factors_too: bool = False
) -> tuple[dict[str, RunningProduct], dict[str, Tensor]]:
    """Return the weighted means of the clients' products and of all else they trained.

    A factor that an update has not was frozen: it is that of ``like``, cut to the update's rank.
    Scalings take no part: all clients have those of ``like``. Reads ``updates`` once, and keeps no
    more of them at a time than :func:`strategies.tensors.weighted_mean`.

    Args:
        updates: the round's updates; ranks may differ.
        like: the adapter they were trained from.
        weighting: what an update counts.
        factors_too: whether factors are averaged as well, which needs one rank.

    Returns:
        The mean of ``b @ a`` by layer, empty if no update has weight; and as
        :func:`strategies.tensors.weighted_mean` gives it, the mean of all other tensors.

    Raises:
        BadUpdate: if an update does not fit the adapter.
        NotLowRank: if ``like`` has no low-rank layers.
    """
    layers = lora_layers(like)
    apart = set() if factors_too else set(lora_tensors(layers))
    sums = {n: RunningProduct(f.b.shape[0], f.a.shape[1]) for n, f in layers.items()}
    total = 0.0

    def counted() -> Iterator[Update]:
        nonlocal total
        for update in updates:
            weight = weight_of(update, weighting)
            for name, factors in sent_factors(update, layers).items():
                if weight:
                    sums[name].add(factors.b, factors.a, weight)
            total += weight
            others = {n: t for n, t in update.tensors.items() if n not in apart}
            yield replace(update, tensors=others)

    rest = weighted_mean(counted(), like, weighting)
    for one in sums.values() if total else ():
        one.scale(1 / total)
    return (sums if total else {}), rest


def sent_factors(update: Update, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return an update's layers, at its own rank: what it does not train is as it was sent.

    Args:
        update: the update.
        layers: those of the adapter it was trained from, of the same rank or above.

    Raises:
        BadUpdate: if its factors do not fit each other, or the adapter.
    """
    found = {}
    for name, own in layers.items():
        names = lora_tensors({name: own})
        a, b = (update.tensors.get(n) for n in list(names)[:2])
        rank = a.shape[0] if a is not None else b.shape[1] if b is not None else len(own.a)
        sent = Factors(
            own.a[:rank] if a is None else a, own.b[:, :rank] if b is None else b, own.scaling
        )
        fits = (
            sent.a.shape == (rank, own.a.shape[1])
            and sent.b.shape == (own.b.shape[0], rank)
            and 1 <= rank <= len(own.a)
        )
        if not fits:
            shapes = f"{list(sent.a.shape)} and {list(sent.b.shape)}"
            raise BadUpdate(
                f"the update of {update.client!r} has {name!r} with lora_A and lora_B of shapes "
                f"{shapes}; the adapter has {list(own.a.shape)} and {list(own.b.shape)}, and a "
                "client may have a lower rank"
            )
        found[name] = sent
    return found


def nearest(product: RunningProduct, like: Factors, row_norm: float = 1.0) -> tuple[Factors, Best]:
    """Return a product's best approximation at the rank of ``like``, and what it kept.

    The rows of ``a`` are orthogonal and of ``row_norm``, and the columns of ``b`` descend, so that
    the first ``k`` of both are the best approximation at rank ``k``. Ranks that the product does
    not need keep directions of ``like.a``, with zero columns of ``b``: they can still be trained.

    Args:
        product: of the layer.
        like: gives rank, dtypes and scaling.
        row_norm: norm of the rows of the new ``a``, > 0.
    """
    left, right = product.factors()
    if product.rank < len(like.a):  # adds nothing but the row space of the old A
        left = torch.cat([left, torch.zeros_like(like.b, dtype=left.dtype)], dim=1)
        right = torch.cat([right, like.a.to(right.dtype)])
    found = best(left, right, len(like.a))
    a, b = torch.zeros_like(like.a), torch.zeros_like(like.b)
    a[: len(found.a)] = (found.a * row_norm).to(a.dtype)
    b[:, : found.b.shape[1]] = (found.b / row_norm).to(b.dtype)
    return Factors(a, b, like.scaling), found


def captured(
    found: Mapping[str, Best], scalings: Mapping[str, Tensor], ranks: Iterable[int] = ()
) -> dict[str, float]:
    """Return the share of the squared singular values that was kept, by layer and of all.

    Args:
        found: by layer.
        scalings: of the layers, 0-d: how much each counts in the whole.
        ranks: lower ones, whose share is told as well.

    Returns:
        ``captured_energy``, ``captured_energy/LAYER`` and, for lower ranks of all layers,
        ``captured_energy_at_RANK`` and ``captured_energy_at_RANK/LAYER``, in [0, 1]; 1 of what is
        zero.
    """
    weights = {name: float(scalings[name]) ** 2 for name in found}
    total = sum(weights[n] * one.total for n, one in found.items())

    def share(kept: Mapping[str, float]) -> float:
        return sum(weights[n] * energy for n, energy in kept.items()) / total if total else 1.0

    metrics = {"captured_energy": share({n: one.kept for n, one in found.items()})}
    for name, one in sorted(found.items()):
        metrics[f"captured_energy/{name}"] = one.kept / one.total if one.total else 1.0
    for rank in sorted(ranks):
        kept = {n: float(one.b[:, :rank].square().sum()) for n, one in found.items()}
        metrics[f"captured_energy_at_{rank}"] = share(kept)
        for name, one in sorted(found.items()):
            part = kept[name] / one.total if one.total else 1.0
            metrics[f"captured_energy_at_{rank}/{name}"] = part
    return metrics


def captured_by_cut(layers: Mapping[str, Factors], ranks: Iterable[int]) -> dict[str, float]:
    """Return how much of each product its first ranks are, whatever basis it is written in.

    It is 1 less the squared norm of what is left out over that of the whole: the share of the
    squared singular values where they descend, as :func:`nearest` leaves them, and anything below
    where ranks undo each other.

    Args:
        layers: by name.
        ranks: how many of the first; those that no layer exceeds are left out.

    Returns:
        ``captured_energy_at_RANK`` and ``captured_energy_at_RANK/LAYER``, at most 1; 1 of what is
        zero.
    """
    metrics = {}
    wholes = {n: product_norm(f.scaling * f.b, f.a) ** 2 for n, f in layers.items()}
    every = sum(wholes.values())
    for rank in sorted(r for r in ranks if any(r < len(f.a) for f in layers.values())):
        tails = {
            n: product_norm(f.scaling * f.b[:, rank:], f.a[rank:]) ** 2 if rank < len(f.a) else 0.0
            for n, f in layers.items()
        }
        metrics[f"captured_energy_at_{rank}"] = 1 - sum(tails.values()) / every if every else 1.0
        for name, tail in tails.items():
            whole = wholes[name]
            metrics[f"captured_energy_at_{rank}/{name}"] = 1 - tail / whole if whole else 1.0
    return metrics


def laid_beneath(
    auxiliary: Tensors, more: Mapping[str, RunningProduct], like: Mapping[str, Factors]
) -> dict[str, RunningProduct]:
    """Return the layers that lie beneath when ``more`` is laid there too, as running sums.

    Args:
        auxiliary: of the state; see :func:`strategies.base.beneath`.
        more: by layer; scalings are in it.
        like: the adapter's layers.
    """
    lying = beneath(auxiliary)
    layers = lora_layers(lying) if lying else {}
    found = {}
    for name, factors in like.items():
        total = RunningProduct(factors.b.shape[0], factors.a.shape[1])
        if name in layers:
            total.add(layers[name].b, layers[name].a, float(layers[name].scaling))
        if name in more and more[name].rank:
            total.add(*more[name].factors())
        if total.rank:
            found[name] = total
    return found


def beneath_tensors(
    layers: Mapping[str, tuple[Tensor, Tensor]], like: Mapping[str, Factors]
) -> dict[str, Tensor]:
    """Return auxiliary tensors of what lies beneath, with scaling 1 and the dtypes of ``like``.

    Args:
        layers: ``b``, ``[out, rank]``, and ``a``, ``[rank, in]``, by layer; rank 0 is left out.
        like: the adapter's layers.
    """
    made = {
        name: Factors(
            a.to(like[name].a.dtype).contiguous(),
            b.to(like[name].b.dtype).contiguous(),
            torch.ones_like(like[name].scaling),
        )
        for name, (b, a) in layers.items()
        if len(a)
    }
    return {BENEATH + name: tensor for name, tensor in lora_tensors(made).items()}


_CUTS: MutableMapping[
    Tensor, dict[int, tuple[tuple[weakref.ref[Tensor], ...], dict[str, Tensor]]]
] = WeakTensorKeyDictionary()
"""Adapters at lower ranks, as long as the adapter lives: clients of one rank share one object."""


def at_rank(adapter: Tensors, rank: int | None) -> Tensors:
    """Return an adapter with the first ``rank`` rows of every A and columns of every B.

    The same object for the same tensors and rank; ``adapter`` itself where no layer has more. The
    best approximation at that rank where singular values descend, as :func:`nearest` leaves them.

    Args:
        adapter: the adapter.
        rank: >= 1, or None for its own.
    """
    layers = lora_layers(adapter)
    if rank is None or all(len(f.a) <= rank for f in layers.values()):
        return adapter
    anchor = next(iter(layers.values())).b
    known = _CUTS.setdefault(anchor, {})
    parts = tuple(adapter[n] for n in sorted(adapter))
    if rank in known:
        cut_from, cut = known[rank]
        same = len(cut_from) == len(parts)
        if same and all(ref() is part for ref, part in zip(cut_from, parts, strict=True)):
            return cut
    cut = {
        **adapter,
        **lora_tensors(
            {
                # clones: a view would keep the anchor, and so itself, alive
                name: Factors(f.a[:rank].clone(), f.b[:, :rank].clone().contiguous(), f.scaling)
                for name, f in layers.items()
            }
        ),
    }
    known[rank] = tuple(weakref.ref(part) for part in parts), cut
    return cut
