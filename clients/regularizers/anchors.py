"""What EWC, MAS and SI share: entries that mattered to earlier tasks are held near their values.

Memory is ``NAME`` under two prefixes: how much an entry matters, and where it is held. Entries of
a task head that has grown since have neither, and are free.

The distance is between factors. ``(B G, G^-1 A)`` is the same model as ``(B, A)`` for any
invertible ``G``, and lies elsewhere: where both factors train, an anchor says more than the model
does. With A frozen it is the model that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from clients.regularizers import Regularizer, When, recall
from strategies.base import Tensors, Update
from strategies.tensors import weighted_mean

ANCHOR = "anchor"


class Anchored(Regularizer):
    """A method that holds entries; how it knows what mattered is its own.

    Attributes:
        kind: of importance, the prefix that it has in memory and in what clients send.
        weight: of the penalty, >= 0; 0 turns it off, and the memory still grows.
        decay: see :func:`accumulated`.
    """

    anchored = True
    kind: ClassVar[str] = "importance"
    weight: float
    decay: float | None = 1.0

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``weight * sum importance (theta - theta*)^2``; None on a first task."""
        found = distance(self.kind, params, memory) if self.weight else None
        return None if found is None else self.weight * found

    def parts(
        self, when: When, params: Tensors, returned: Collection[str]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of the importance of every trained tensor: the tensor's."""
        return shapes(self.kind, params, returned)

    def combine(
        self, when: When, params: Tensors, memory: Tensors, updates: Iterable[Update]
    ) -> Tensors:
        """Return the memory with the clients' mean importance, and the result that it is at."""
        fresh = mean(self.kind, params, updates)
        return accumulated(self.kind, params, memory, fresh, self.decay)


def shapes(kind: str, params: Tensors, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one tensor of a ``kind`` for each of ``params`` that ``names`` holds."""
    return {f"{kind}/{name}": tuple(params[name].shape) for name in names}


def distance(kind: str, params: Mapping[str, Tensor], memory: Tensors) -> Tensor | None:
    """Return ``sum importance * (theta - anchor)^2`` over all entries that have both, or None."""
    terms = []
    for name, importance in sorted(recall(memory, kind).items()):
        if name in params:
            now = _entries(name, params[name].float(), importance)
            terms.append((importance * (now - memory[f"{ANCHOR}/{name}"]).square()).sum())
    return torch.stack(terms).sum() if terms else None


def pull(kind: str, name: str, value: Tensor, memory: Tensors) -> Tensor:
    """Return half the gradient of :func:`distance` by one tensor, of its shape: 0 where free."""
    found = torch.zeros_like(value)
    importance = memory.get(f"{kind}/{name}")
    if importance is not None:
        entries = _entries(name, value, importance)
        _entries(name, found, importance).copy_(importance * (entries - memory[f"{ANCHOR}/{name}"]))
    return found


def mean_of_examples(
    kind: str, gradients: Iterable[Mapping[str, Tensor]], of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the mean over examples of ``of`` their gradients, ``[batch, *shape]`` by name."""
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in gradients:
        for name, found in batch.items():
            added = of(found.double()).sum(0)
            sums[name] = added if name not in sums else sums[name] + added
        count += len(next(iter(batch.values())))
    return {f"{kind}/{name}": (total / count).float() for name, total in sums.items()}


def mean(kind: str, params: Tensors, updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return the clients' mean of a ``kind``, each weighed by its examples, by tensor's name."""
    like = {f"{kind}/{name}": tensor.float() for name, tensor in params.items()}
    return recall(weighted_mean(updates, like, "examples"), kind)


def accumulated(
    kind: str, params: Tensors, memory: Tensors, fresh: Tensors, decay: float | None
) -> dict[str, Tensor]:
    """Return the memory with a task more.

    Args:
        kind: of importance.
        params: the adapter after the task.
        memory: before it.
        fresh: how much each entry mattered to the task, by tensor's name; below 0 counts as 0,
            which is SI's for what raised the loss, and otherwise what nobody can have measured.
        decay: by which older importances are multiplied, in [0, 1], while the anchor is the newest
            task's; None keeps each task's own anchor: a sum of squares is one square around the
            mean of its anchors, weighed by importance, but for a constant.
    """
    grown = dict(memory)
    for name, importance in fresh.items():
        now, old = params[name].detach().double(), memory.get(f"{kind}/{name}")
        total, anchor = importance.double().clamp(min=0), now
        if old is not None:
            before, held = torch.zeros_like(now), now.clone()
            _entries(name, before, old).copy_(old)
            _entries(name, held, old).copy_(memory[f"{ANCHOR}/{name}"])
            if decay is None:
                anchor = torch.lerp(now, held, _share(before, before + total))
            total = total + (1.0 if decay is None else decay) * before
        grown[f"{kind}/{name}"], grown[f"{ANCHOR}/{name}"] = total.float(), anchor.float()
    return grown


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return ``part / whole``, 0 where both are 0."""
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


def _entries(name: str, tensor: Tensor, known: Tensor) -> Tensor:
    """Return what of a tensor was there when ``known`` was remembered: of a head, its rows."""
    return tensor[: len(known)] if name.startswith("head.") else tensor
