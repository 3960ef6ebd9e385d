"""LoRI: A is frozen and shared, and of B only the largest tenth trains, in a second phase.

Source: arXiv 2504.07448, which is not about federations; this is its two phases with every client
sharing A, which the authors' code draws anew for every run and phase (a mask of one A's B is used
on another's there). The first ``calibration`` rounds train B densely: FFA-LoRA, and LoRI-D where
they are all. The mask is of the ``k`` entries of the aggregate that are largest over all layers
together; the code's threshold keeps everything where fewer than ``k`` entries are not zero, and
more than ``k`` where there are ties; here it is exactly ``k``. From then on B is trained from zero,
on the mask only.

Masks of tasks that were made apart overlap as chance has it. With a library of earlier tasks' LoRI
adapters, A is theirs, and no entry of B that one of them uses is in the mask: the sum of all is
then every one of them, entry by entry. The authors' code can leave such entries out too, but draws
another A.

Under DP the mask is a function of privatised updates, and costs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.library import BadLibrary, library_layers
from strategies.plugins import Range
from strategies.tensors import B_AND_HEAD, Factors, Weighting, lora_layers, weighted_mean

_A, _B = ".lora_A.weight", ".lora_B.weight"
_MASK, _TAKEN, _ROUND, _BEGUN = "mask/", "taken/", "round", "masked"
_EMPTIED: MutableMapping[Tensor, tuple[tuple[weakref.ref[Tensor], ...], dict[str, Tensor]]] = (
    WeakTensorKeyDictionary()
)
"""Adapters with B = 0, as long as the adapter lives: all clients share one object."""


@dataclass(frozen=True, slots=True)
class LoRI:
    """Clients train B and head under a frozen A; after calibration, B from zero on a common mask.

    The version after the last calibration round is the dense one; the next round starts from B = 0.
    With a library, A is that of its adapters, and the mask has none of the entries that they use.

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

    starts: ClassVar[str] = "stack"
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"exact", "mean-only", "private", "recycles", "shared-gauge", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; of ``setting``, the library is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
            BadLibrary: if the library's adapters have not one A that this one can take, or leave
                fewer entries than the mask is to have.
        """
        layers = lora_layers(adapter)
        library = library_layers(setting.library, layers)
        shared = {n + _A: _shared(n, layers[n], found) for n, found in library.items()}
        taken = {
            n + _B: torch.stack([one.b != 0 for one in found]).any(dim=0)
            for n, found in library.items()
        }
        used = sum(int(entries.sum()) for entries in taken.values())
        total = sum(factors.b.numel() for factors in layers.values())
        if (wanted := _number(total, 1 - self.sparsity)) > total - used:
            raise BadLibrary(
                f"the library's adapters use {used} of the {total} entries of B, and {wanted} are "
                "to be in the mask; raise strategy.sparsity, or give adapters that lori masked"
            )
        counters = {_ROUND: torch.tensor(0), _BEGUN: torch.tensor(False)}
        return ServerState(
            {**adapter, **shared}, counters | {_TAKEN + n: t for n, t in taken.items()}
        )

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which B (with a mask, once there is one) and head are to train."""
        mask = _kept(state, _MASK)
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
        masks = _kept(state, _MASK)
        adapter = {**state.adapter, **mean, **{n: mean[n] * m for n, m in masks.items()}}
        done = state.auxiliary[_ROUND] + 1
        auxiliary = {**state.auxiliary, _ROUND: done, _BEGUN: torch.tensor(bool(masks))}
        if not masks and int(done) >= self.calibration:
            sizes = {n + _B: f.b.abs() for n, f in lora_layers(adapter).items()}
            masks = largest(sizes, 1 - self.sparsity, _kept(state, _TAKEN))
        return ServerState(adapter, {**auxiliary, **{_MASK + n: m for n, m in masks.items()}})


def largest(sizes: Tensors, share: float, taken: Tensors | None = None) -> dict[str, Tensor]:
    """Return boolean masks of the largest entries of all tensors together, an exact number.

    Of equal entries the first counts, by the tensors' names and then by place.

    >>> largest({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([5.0, 0.0])}, 0.25)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}

    Args:
        sizes: by name, >= 0.
        share: of all entries, in (0, 1]; their number is rounded down, but is at least one.
        taken: entries that are never chosen, as long as there are enough others.
    """
    names, never = sorted(sizes), taken or {}
    free = {n: sizes[n].masked_fill(never[n], -1.0) if n in never else sizes[n] for n in names}
    flat = torch.cat([free[name].flatten() for name in names])
    order = torch.sort(flat, descending=True, stable=True).indices[: _number(flat.numel(), share)]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = True
    parts = torch.split(chosen, [sizes[name].numel() for name in names])
    return {
        name: part.reshape(sizes[name].shape).clone()
        for name, part in zip(names, parts, strict=True)
    }


def _number(total: int, share: float) -> int:
    return max(int(share * total + 1e-6), 1)  # 1 - 0.9 is a little below 0.1


def _shared(layer: str, own: Factors, library: Sequence[Factors]) -> Tensor:
    """Return the library's A of a layer, in the dtype of the adapter's.

    Raises:
        BadLibrary: if its adapters have not all the same, or the adapter cannot take it.
    """
    shared = library[0].a
    if any(one.a.shape != shared.shape or not torch.equal(one.a, shared) for one in library):
        raise BadLibrary(
            f"the library's adapters have not the same A in layer {layer!r}, so that entries of "
            "their B cannot be told apart; give adapters that lori trained, each with the ones "
            "before it as its library"
        )
    if shared.shape != own.a.shape:
        raise BadLibrary(
            f"the library's adapters have rank {len(shared)} in layer {layer!r}, and this one has "
            f"{len(own.a)}; set adapter.r to {len(shared)}"
        )
    if own.b.any() and not torch.equal(own.a.to(shared.dtype), shared):
        raise BadLibrary(
            f"what the run goes on from has another A in layer {layer!r} than the library, and its "
            "B means nothing with that one; start fresh, or leave library out"
        )
    return shared.to(own.a.dtype)


def _kept(state: ServerState, prefix: str) -> dict[str, Tensor]:
    known = sorted(name for name in state.auxiliary if name.startswith(prefix))
    return {name.removeprefix(prefix): state.auxiliary[name] for name in known}


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
