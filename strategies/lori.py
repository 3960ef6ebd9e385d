"""LoRI: A is frozen and shared, and of B only the largest tenth trains, in a second phase.

Source: arXiv 2504.07448, which is not about federations; this is its two phases with every client
sharing A, which the authors' code draws anew for every run and phase (a mask of one A's B is used
on another's there). The first ``calibration`` rounds train B densely: FFA-LoRA, and LoRI-D where
they are all. The mask is of the ``k`` entries of the aggregate that are largest over all layers
together; the code's threshold keeps everything where fewer than ``k`` entries are not zero, and
more than ``k`` where there are ties; here it is exactly ``k``. From then on B is trained from zero,
on the mask only.

Under DP the mask is a function of privatised updates, and costs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.tensors import B_AND_HEAD, Weighting, lora_layers, weighted_mean

_B, _MASK, _ROUND, _BEGUN = ".lora_B.weight", "mask/", "round", "masked"
_EMPTIED: MutableMapping[Tensor, tuple[tuple[weakref.ref[Tensor], ...], dict[str, Tensor]]] = (
    WeakTensorKeyDictionary()
)
"""Adapters with B = 0, as long as the adapter lives: all clients share one object."""


@dataclass(frozen=True, slots=True)
class LoRI:
    """Clients train B and head under a frozen A; after calibration, B from zero on a common mask.

    The version after the last calibration round is the dense one; the next round starts from B = 0.

    Attributes:
        calibration: rounds that train B densely before the mask is made, >= 1; those without an
            update do not count.
        sparsity: share of B's entries that the mask leaves out, in [0, 1); at least one is kept.
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    calibration: Annotated[int, Range(1)] = 1
    sparsity: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"exact", "private", "shared-gauge", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter), {_ROUND: torch.tensor(0), _BEGUN: torch.tensor(False)})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which B (with a mask, once there is one) and head are to train."""
        mask = _masks(state)
        fresh = mask and not state.auxiliary[_BEGUN]
        tensors = _emptied(state.adapter) if fresh else state.adapter
        return Broadcast(tensors, trainable=B_AND_HEAD, mask=mask)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with B and head averaged, and the mask when its round has come.

        What updates have off the mask does not count.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        if not mean:
            return state
        masks = _masks(state)
        adapter = {**state.adapter, **mean, **{n: mean[n] * m for n, m in masks.items()}}
        done = state.auxiliary[_ROUND] + 1
        auxiliary = {**state.auxiliary, _ROUND: done, _BEGUN: torch.tensor(bool(masks))}
        if not masks and int(done) >= self.calibration:
            sizes = {n + _B: f.b.abs() for n, f in lora_layers(adapter).items()}
            masks = largest(sizes, 1 - self.sparsity)
        return ServerState(adapter, {**auxiliary, **{_MASK + n: m for n, m in masks.items()}})


def largest(sizes: Tensors, share: float) -> dict[str, Tensor]:
    """Return boolean masks of the largest entries of all tensors together, an exact number.

    Of equal entries the first counts, by the tensors' names and then by place.

    >>> largest({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([5.0, 0.0])}, 0.25)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}

    Args:
        sizes: by name, >= 0.
        share: of all entries, in (0, 1]; their number is rounded down, but is at least one.
    """
    names = sorted(sizes)
    flat = torch.cat([sizes[name].flatten() for name in names])
    count = max(int(share * flat.numel() + 1e-6), 1)  # 1 - 0.9 is a little below 0.1
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = True
    parts = torch.split(chosen, [sizes[name].numel() for name in names])
    return {
        name: part.reshape(sizes[name].shape).clone()
        for name, part in zip(names, parts, strict=True)
    }


def _masks(state: ServerState) -> dict[str, Tensor]:
    known = sorted(name for name in state.auxiliary if name.startswith(_MASK))
    return {name.removeprefix(_MASK): state.auxiliary[name] for name in known}


def _emptied(adapter: Tensors) -> Tensors:
    """Return an adapter with every B at zero: the same object for the same adapter."""
    layers = lora_layers(adapter)
    anchor = next(iter(layers.values())).b
    parts = [adapter[name] for name in sorted(adapter)]
    known, made = _EMPTIED.get(anchor, ((), {}))
    if [ref() is part for ref, part in zip(known, parts, strict=False)] == [True] * len(parts):
        return made
    made = {**adapter, **{n + _B: torch.zeros_like(f.b) for n, f in layers.items()}}
    _EMPTIED[anchor] = tuple(weakref.ref(part) for part in parts), made
    return made
