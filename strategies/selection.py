"""Which ranks of an adapter a client trains and sends, where a strategy gives it a budget of them.

Source: arXiv 2410.22815 (section 4.2). A client trains every rank for a share of its steps, keeps
those that changed the model most, of all layers together, and puts the others back as they were
sent. What travels of a factor are its chosen columns (of B) or rows (of A) and, as ``NAME:ranks``,
which they are; all that was not chosen is as it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, lora_layers, lora_tensors
from strategies.uplink import BadEncoding

_RANKS, _PROBE = "selection/ranks", "selection/probe"
_CHOSEN = ":ranks"
_B = ".lora_B.weight"


class Budget(NamedTuple):
    """How much of its adapter a client may train and send.

    Attributes:
        ranks: how many, of all layers together, >= 1.
        probe: the share of a round's steps in which it trains all of them, in (0, 1].
    """

    ranks: int
    probe: float


def asking(budget: Budget) -> dict[str, Tensor]:
    """Return a budget as extra tensors of a broadcast; the same objects for the same budget."""
    return {_RANKS: _number(budget.ranks), _PROBE: _number(budget.probe)}


@lru_cache(maxsize=1024)
def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def budget_of(extra: Tensors) -> Budget | None:
    """Return the budget among a broadcast's extra tensors, or None.

    >>> budget_of(asking(Budget(8, 0.25)))
    Budget(ranks=8, probe=0.25)
    """
    if _RANKS not in extra:
        return None
    return Budget(int(extra[_RANKS]), float(extra[_PROBE]))


def num_ranks(adapter: Tensors) -> int:
    """Return how many ranks all layers of an adapter have together."""
    return sum(len(factors.a) for factors in lora_layers(adapter).values())


def chosen(sent: Tensors, trained: Tensors, ranks: int) -> dict[str, Tensor]:
    """Return which ranks changed the model most, as booleans ``[rank]`` by trained factor.

    A rank counts by the Frobenius norm of what it changed, ``|scaling| (|dB_i| |A_i| + |B_i|
    |dA_i|)``, of which a round that trains one factor has one term. Of equals the first is chosen,
    by the layers' names and then by place.

    Args:
        sent: the adapter as it was sent.
        trained: the factors that were trained, with their values now.
        ranks: how many to choose, of all layers together.
    """
    layers = lora_layers(sent)
    sizes = {name: _sizes(name, old, trained) for name, old in layers.items()}
    order = torch.sort(torch.cat(list(sizes.values())), descending=True, stable=True).indices
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[order[:ranks]] = True
    parts = torch.split(taken, [len(size) for size in sizes.values()])
    return {
        factor: part.clone()
        for name, part in zip(sizes, parts, strict=True)
        for factor in lora_tensors({name: layers[name]})
        if factor in trained
    }


def _sizes(name: str, old: Factors, trained: Tensors) -> Tensor:
    """Return ``[rank]``: how much each rank of a layer changed the model."""
    names = lora_tensors({name: old})
    new = Factors(*(trained.get(n, t).double() for n, t in names.items()))
    moved_b = (new.b - old.b.double()).norm(dim=0) * old.a.double().norm(dim=1)
    moved_a = old.b.double().norm(dim=0) * (new.a - old.a.double()).norm(dim=1)
    sizes: Tensor = new.scaling.abs() * (moved_b + moved_a)
    return sizes


def mask_of(factor: str, ranks: Tensor, like: Tensor) -> Tensor:
    """Return booleans of a factor's shape: whether an entry is of a chosen rank."""
    return (ranks if factor.endswith(_B) else ranks[:, None]).expand_as(like)


def compact(tensors: Tensors, ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what travels of trained tensors: of a factor its chosen ranks, and which they are.

    Args:
        tensors: by name.
        ranks: as :func:`chosen` gives them; a tensor that is not among them travels whole.
    """
    found = dict(tensors)
    for name in sorted(ranks.keys() & tensors.keys()):
        places = ranks[name].nonzero().flatten()
        found[name] = tensors[name].index_select(_axis(name), places).contiguous()
        found[name + _CHOSEN] = places.to(torch.int32)
    return found


def expanded(tensors: Tensors, sent: Tensors) -> dict[str, Tensor]:
    """Return whole tensors: what was not chosen is as it was sent.

    Args:
        tensors: as :func:`compact` gives them.
        sent: the adapter as it was sent.

    Raises:
        BadEncoding: if the ranks are none that the adapter has, or do not fit what came of it.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_CHOSEN)}
    factors = lora_tensors(lora_layers(sent))
    for name in sorted(n.removesuffix(_CHOSEN) for n in tensors.keys() - found.keys()):
        places, whole = tensors[name + _CHOSEN], factors.get(name)
        if whole is None or whole.dim() != 2 or name not in found:
            raise BadEncoding(f"{name + _CHOSEN} is not asked for")
        axis, part = _axis(name), found[name]
        _check_places(name + _CHOSEN, places, whole.shape[axis])
        wanted = list(whole.shape)
        wanted[axis] = len(places)
        if list(part.shape) != wanted or part.dtype != whole.dtype:
            raise BadEncoding(
                f"{name} is {part.dtype} {list(part.shape)}, expected {whole.dtype} {wanted}"
            )
        found[name] = whole.index_copy(axis, places.long(), part)
    return found


def refusal_of(tensors: Tensors, budget: Budget, sent: Tensors) -> str | None:
    """Return why an update holds more than its budget, or None if it does not.

    Args:
        tensors: as they came.
        budget: what the client was given.
        sent: the adapter as it was sent.
    """
    num = 0
    for name, factors in lora_layers(sent).items():
        parts = [n for n in lora_tensors({name: factors}) if n in tensors]
        held = [
            len(tensors[n + _CHOSEN]) if n + _CHOSEN in tensors else len(factors.a) for n in parts
        ]
        num += max(held, default=0)
    if num <= budget.ranks:
        return None
    return f"it holds {num} ranks, and its budget is {budget.ranks}"


def _axis(factor: str) -> int:
    return 1 if factor.endswith(_B) else 0


def _check_places(name: str, places: Tensor, rank: int) -> None:
    fits = places.dtype == torch.int32 and places.dim() == 1
    if fits and len(places):
        inside = int(places[0]) >= 0 and int(places[-1]) < rank
        fits = inside and bool((places.diff() > 0).all())
    if not fits:
        raise BadEncoding(f"{name} must hold ascending ranks from 0 to {rank - 1}")
