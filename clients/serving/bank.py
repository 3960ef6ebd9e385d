"""Adapters side by side on one base model: which one an example gets is the batch's to say.

The factors of all adapters lie stacked, ``[slots, rank, in]`` and ``[slots, out, rank]``, padded
with zeros to the largest rank of the layer, which adds nothing. For a batch, the rows of its
adapters are gathered once and multiplied with ``bmm``; as long as the batch stays the same (as
while it decodes) they are not gathered again. A batch of one adapter alone is a plain product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clients import placement
from clients.serving.changes import Change, Unservable

BASE = 0
"""The slot of no adapter: the base model as it is."""


class _Picked(NamedTuple):
    """What a layer does to one batch: batched by example, or of one adapter for all of them."""

    a: Tensor  # [batch, in, rank] or [in, rank]
    b: Tensor  # [batch, rank, out] or [rank, out]
    gain: Tensor | None  # [batch, 1, out] or [out], minus 1
    bias: Tensor | None


class _Stack:
    """One layer's changes, by slot."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features = placement.shape(module)
        self._new = partial(torch.zeros, dtype=dtype, device=device)
        self.a = self._new(1, 0, self.in_features)
        self.b = self._new(1, self.out_features, 0)
        self.gain: Tensor | None = None
        self.bias: Tensor | None = None
        self.holds: set[int] = set()

    def write(self, slot: int, change: Change) -> None:
        self.clear(slot)
        self._reserve(max(slot + 1, len(self.a)), max(change.rank, self.a.shape[1]))
        self.a[slot, : change.rank] = change.a.to(self.a)
        self.b[slot, :, : change.rank] = change.b.to(self.b)
        if change.gain is not None:
            self.gain = self._rows(self.gain)
            self.gain[slot] = change.gain.to(self.gain) - 1
        if change.bias is not None:
            self.bias = self._rows(self.bias)
            self.bias[slot] = change.bias.to(self.bias)
        self.holds.add(slot)

    def clear(self, slot: int) -> None:
        if slot in self.holds:
            self.holds.discard(slot)
            for tensor in (self.a, self.b, self.gain, self.bias):
                if tensor is not None and slot < len(tensor):
                    tensor[slot] = 0

    def pick(self, rows: Tensor, alone: int | None) -> _Picked:
        if alone is not None:
            gain, bias = (None if t is None else t[alone] for t in self._beside())
            return _Picked(self.a[alone].T, self.b[alone].T, gain, bias)
        held = rows.clamp(max=len(self.a) - 1) * (rows < len(self.a))  # unknown slots add nothing
        gain, bias = (None if t is None else t[held].unsqueeze(1) for t in self._beside())
        return _Picked(
            self.a[held].transpose(1, 2).contiguous(),
            self.b[held].transpose(1, 2).contiguous(),
            gain,
            bias,
        )

    def _beside(self) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if t is None else self._rows(t) for t in (self.gain, self.bias))  # type: ignore[return-value]  # two

    def _rows(self, tensor: Tensor | None) -> Tensor:
        """Return ``[slots, out]`` with a row for every slot."""
        if tensor is not None and len(tensor) == len(self.a):
            return tensor
        grown = self._new(len(self.a), self.out_features)
        if tensor is not None:
            grown[: len(tensor)] = tensor
        return grown

    def _reserve(self, slots: int, rank: int) -> None:
        old_slots, old_rank = self.a.shape[:2]
        if slots > old_slots:
            slots = max(slots, 2 * old_slots)
        if (slots, rank) != (old_slots, old_rank):
            a = self._new(slots, rank, self.in_features)
            b = self._new(slots, self.out_features, rank)
            a[:old_slots, :old_rank] = self.a
            b[:old_slots, :, :old_rank] = self.b
            self.a, self.b = a, b


class Bank:
    """The adapters of one base model, each in a slot.

    Not safe for several threads: whoever runs the model also puts and drops.

    Args:
        backbone: the base model, whose linear layers get forward hooks.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._linear = placement.linear_layers(backbone)
        first: Any = next(p for p in backbone.parameters() if p.is_floating_point())
        self._dtype, self.device = first.dtype, first.device
        self._stacks: dict[str, _Stack] = {}
        self._hooks: list[Any] = []
        self._taken: set[int] = {BASE}
        self._batch: tuple[int, ...] = ()
        self._rows = torch.zeros(0, dtype=torch.long)
        self._picked: dict[str, _Picked | None] = {}
        self._active = False

    def put(self, changes: Mapping[str, Change]) -> int:
        """Take an adapter in and return its slot, which no other has until it is dropped.

        Raises:
            Unservable: if the base model has not its layers.
        """
        for name in changes:
            if name not in self._linear:
                raise Unservable(f"the base model has no linear layer {name}")
        slot = next(i for i in range(len(self._taken) + 1) if i not in self._taken)
        for name, change in changes.items():
            if name not in self._stacks:
                module = self._linear[name]
                self._stacks[name] = _Stack(module, self._dtype, self.device)
                self._hooks.append(module.register_forward_hook(partial(self._add, name)))
            self._stacks[name].write(slot, change)
        self._taken.add(slot)
        self._forget_batch()
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot; nothing of its adapter stays.

        Raises:
            KeyError: if there is no adapter in it.
        """
        if slot == BASE:
            raise KeyError(slot)
        self._taken.remove(slot)
        for stack in self._stacks.values():
            stack.clear(slot)
        self._forget_batch()

    def __len__(self) -> int:
        return len(self._taken) - 1

    @contextmanager
    def using(self, slots: Sequence[int]) -> Iterator[None]:
        """Have each example of the batches run within computed with the adapter in its slot.

        Args:
            slots: one for each example, in order; :data:`BASE` for no adapter.
        """
        batch = tuple(slots)
        if batch != self._batch:
            self._picked.clear()
            self._rows = torch.tensor(batch, dtype=torch.long, device=self.device)
        self._batch = batch
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def close(self) -> None:
        """Leave the base model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stacks.clear()

    def _forget_batch(self) -> None:
        self._batch = ()
        self._picked.clear()

    def _pick(self, name: str) -> _Picked | None:
        if name not in self._picked:
            stack, slots = self._stacks[name], set(self._batch)
            alone = self._batch[0] if len(slots) == 1 else None
            touched = bool(stack.holds & slots)
            self._picked[name] = stack.pick(self._rows, alone) if touched else None
        return self._picked[name]

    def _add(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Return a layer's output with what each example's adapter adds to it."""
        picked = self._pick(name) if self._active else None
        if picked is None:
            return None
        x, size = inputs[0].to(self._dtype), len(self._batch)
        if picked.a.dim() == 2:
            own, added = output, x @ picked.a @ picked.b
        elif len(x) % size:
            raise Unservable(
                f"{name} gets {len(x)} rows for a batch of {size}: this base model mixes "
                "examples, and cannot be served with different adapters"
            )
        else:  # some models flatten examples and tokens into one axis
            own = output.reshape(size, -1, output.shape[-1])
            added = torch.bmm(torch.bmm(x.reshape(size, -1, x.shape[-1]), picked.a), picked.b)
        if picked.gain is not None:
            bias = getattr(module, "bias", None)
            added = added + picked.gain * (own if bias is None else own - bias)
        if picked.bias is not None:
            added = added + picked.bias
        return (own + added.to(own.dtype)).view(output.shape)
