"""Clients' changes of the model as vectors: their inner products, and how to shorten one.

A client's change is that of each product ``scaling * B A`` and of each other trained tensor (a
head), since the adapter it was sent. Factors alone say nothing: ``(B G^-1)(G A)`` is the same model
for every invertible G. Inner products of products are taken from the factors, by ``<L R, L' R'> =
<L^T L', R R'^T>``, in float64, at O((out + in) rank² n²) for n updates; where all share a factor,
at O(out rank n²). No product is formed.

Cores between two frozen factors are a shared gauge: ``B C A`` has the inner products of ``R C S``,
where R and S are the factors' triangles, ``[rank, rank]``. With orthonormal factors they are those
of the cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strategies.base import Tensors, Update
from strategies.cores import cored_layers
from strategies.tensors import CORE, BadUpdate, Factors, lora_layers, lora_tensors

_A, _B, _SCALING = ".lora_A.weight", ".lora_B.weight", ".scaling"
_HALVINGS = 100  # more than a float64 has bits
_DOUBLINGS = 200


def comparable(
    adapter: Tensors, updates: Sequence[Update] = ()
) -> tuple[Tensors, Sequence[Update]]:
    """Return plain factors whose products have the inner products of these; as they are if plain.

    A core goes into B, and B and A become their triangles.

    Args:
        adapter: what the clients were sent.
        updates: of it.

    Raises:
        NotLowRank: if some layers have a core and others none.
        BadUpdate: if an update changes a factor around a core.
    """
    if not any(name.endswith(CORE) for name in adapter):
        lora_layers(adapter)
        return adapter, updates
    layers = cored_layers(adapter)
    lefts = {n: torch.linalg.qr(one.b.double(), mode="r").R for n, one in layers.items()}
    rights = {n: torch.linalg.qr(one.a.double().T, mode="r").R.T for n, one in layers.items()}
    factors = lora_tensors({n: Factors(one.a, one.b, one.scaling) for n, one in layers.items()})

    def plain(tensors: Tensors) -> dict[str, Tensor]:
        found = {n: t for n, t in tensors.items() if n not in factors and not n.endswith(CORE)}
        for name, left in lefts.items():
            if name + CORE in tensors:
                found[name + _B] = left @ tensors[name + CORE].double()
        return found

    whole = plain(adapter)
    for name, one in layers.items():
        whole |= {name + _A: rights[name], name + _SCALING: one.scaling}
    found = []
    for update in updates:
        moved = sorted(factors.keys() & update.tensors.keys())
        if moved:
            raise BadUpdate(
                f"the update of {update.client!r} has {moved[0]!r}, which is frozen around a core"
            )
        found.append(replace(update, tensors=plain(update.tensors)))
    return whole, found


def gram(adapter: Tensors, updates: Sequence[Update], head: bool = True) -> Tensor:
    """Return the inner products of the updates' changes.

    Args:
        adapter: what the clients were sent.
        updates: at least one; all train the same tensors. Ranks may differ.
        head: whether the head counts too. What else trains and is no low-rank factor, such as a
            bias or a magnitude, always does.

    Returns:
        ``[n, n]``, float64, symmetric. What overflows is not finite.

    Raises:
        NotLowRank: if a layer is neither a plain product nor one with a core.
    """
    adapter, updates = comparable(adapter, updates)
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for layer, old in lora_layers(adapter).items():
        trained = [name for name in lora_tensors({layer: old}) if name in updates[0].tensors]
        if trained:
            changes = _Changes(old)
            lefts, rights = zip(*(changes.of(update, layer) for update in updates), strict=True)
            total += _product_gram(lefts, rights)
    for name in _others(adapter, updates[0], head):
        rows = torch.stack([_moved(adapter, update, name).flatten() for update in updates])
        total += rows @ rows.T
    return (total + total.T) / 2


def distances(inner: Tensor) -> Tensor:
    """Return squared distances ``[n, n]`` from inner products ``[n, n]``; what overflows is inf.

    >>> distances(torch.tensor([[0.0, 0.0], [0.0, 9.0]]))
    tensor([[0., 9.],
            [9., 0.]])
    """
    norms = inner.diagonal()
    squared = norms[:, None] + norms[None, :] - 2 * inner
    return torch.nan_to_num(squared, nan=math.inf, posinf=math.inf, neginf=math.inf).clamp(min=0)


def closeness(inner: Tensor, hostile: int) -> list[int]:
    """Return all places by Krum's score, the lowest first; of equals, the first.

    The score is the sum of the squared distances to the ``n - hostile - 2`` nearest others (arXiv
    1703.02757, section 4). "Others" leaves out the point itself, by its place: not whatever is
    nearest.

    Args:
        inner: ``[n, n]``, inner products; n >= hostile + 3.
        hostile: how many are not counted as near, >= 0.
    """
    squared = distances(inner).fill_diagonal_(math.inf)
    nearest = squared.sort(dim=1).values[:, : len(squared) - hostile - 2]
    return torch.sort(nearest.sum(dim=1), stable=True).indices.tolist()


def scaled(adapter: Tensors, update: Update, factor: float) -> Update:
    """Return ``update`` with every trained tensor's change times ``factor``; 1 is itself."""
    if factor == 1:
        return update
    tensors = {
        name: (adapter[name].double() + factor * _moved(adapter, update, name)).to(tensor.dtype)
        for name, tensor in update.tensors.items()
    }
    return replace(update, tensors=tensors)


def factor_for(adapter: Tensors, update: Update, norm: float, head: bool = True) -> float:
    """Return by what to multiply the change of every trained tensor to give the change this norm.

    Where one factor is frozen it is ``norm`` over the change's norm. Where both are trained, the
    change of the products is ``t (dB A + B dA) + t² dB dA``, and ``t`` is found by bisection; the
    norm is then at most ``norm``, but for rounding.

    Args:
        adapter: what the client was sent.
        update: of the adapter's ranks.
        norm: >= 0.
        head: as in :func:`gram`.

    Returns:
        At least 0; 1 for no change.
    """
    linear, cross, square = _curve(*comparable(adapter, [update]), head)

    def length(t: float) -> float:
        return t * math.sqrt(max(linear + 2 * t * cross + t * t * square, 0.0))

    if square == 0:
        return norm / length(1.0) if linear > 0 else 1.0
    high = 1.0
    for _ in range(_DOUBLINGS):
        if length(high) > norm:
            break
        high *= 2
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) <= norm else (low, middle)
    return low


def _curve(adapter: Tensors, updates: Sequence[Update], head: bool) -> tuple[float, float, float]:
    """Return the squared norm of the linear part, its product with the quadratic one, and that's.

    The change of the model is ``t linear + t² quadratic`` where all tensors move by ``t`` times
    their change.
    """
    total, update = torch.zeros(2, 2, dtype=torch.float64), updates[0]
    for layer, factors in lora_layers(adapter).items():
        changes = _Changes(factors)
        old, new = changes.old, changes.new(update, layer)
        b, a, s = new.b - old.b, new.a - old.a, old.scaling
        lefts = [s * torch.cat([b, old.b], dim=1), s * b]
        total += _product_gram(lefts, [torch.cat([old.a, a]), a])
    for name in _others(adapter, update, head):
        total[0, 0] += _moved(adapter, update, name).square().sum()
    return float(total[0, 0]), float(total[0, 1]), float(total[1, 1])


class _Changes:
    """The changes of one layer's product since ``factors``, in float64."""

    def __init__(self, factors: Factors) -> None:
        self.old = Factors(*(tensor.double() for tensor in factors))

    def new(self, update: Update, layer: str) -> Factors:
        """Return the layer as a client has it now; what it did not train is the same object."""
        names = lora_tensors({layer: self.old})
        return Factors(
            *(update.tensors[n].double() if n in update.tensors else t for n, t in names.items())
        )

    def of(self, update: Update, layer: str) -> tuple[Tensor, Tensor]:
        """Return ``left`` and ``right``, whose product is the change of a client's product."""
        old, new = self.old, self.new(update, layer)
        if new.scaling is not old.scaling or new.a.shape != old.a.shape:  # its own rank
            left = torch.cat([new.scaling * new.b, -old.scaling * old.b], dim=1)
            return left, torch.cat([new.a, old.a])
        if new.a is old.a:
            return new.scaling * (new.b - old.b), old.a
        if new.b is old.b:
            return old.b, new.scaling * (new.a - old.a)
        left = new.scaling * torch.cat([new.b - old.b, old.b], dim=1)
        return left, torch.cat([new.a, new.a - old.a])


def _product_gram(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Return the inner products ``[n, n]`` of the products ``left @ right``."""
    if all(right is rights[0] for right in rights):
        return _shared_gram(lefts, rights[0])
    if all(left is lefts[0] for left in lefts):
        return _shared_gram([right.T for right in rights], lefts[0].T)
    left, right = torch.cat(list(lefts), dim=1), torch.cat(list(rights))
    ranks = torch.tensor([one.shape[0] for one in rights])
    owner = torch.arange(len(rights)).repeat_interleave(ranks)
    terms = (left.T @ left) * (right @ right.T)
    rows = terms.new_zeros(len(rights), len(owner)).index_add_(0, owner, terms)
    return rows.new_zeros(len(rights), len(rights)).index_add_(1, owner, rows)


def _shared_gram(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
    """Return the inner products where all share ``right``, ``[rank, in]``: as of rows."""
    triangle = torch.linalg.qr(right.T, mode="r").R
    rows = torch.stack([(left @ triangle.T).flatten() for left in lefts])
    return rows @ rows.T


def _others(adapter: Tensors, update: Update, head: bool) -> list[str]:
    """Return the names of the trained tensors that are no part of a low-rank layer, sorted."""
    names = sorted(update.tensors.keys() - lora_tensors(lora_layers(adapter)).keys())
    return [name for name in names if head or not name.startswith("head.")]


def _moved(adapter: Tensors, update: Update, name: str) -> Tensor:
    return update.tensors[name].double() - adapter[name].double()
