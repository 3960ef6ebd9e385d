"""The client's half of rank self-pruning (HetLoRA, 2401.06432): a penalty, and a lower rank.

What a client has given up of a layer stays given up: it keeps the layer's rank among its own
tensors, and starts from the first ranks of what it is sent. See ``strategies/pruning.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clients.assignment import Assignment
from strategies.base import Tensors
from strategies.pruning import PruningRule, cut, pruning_of
from strategies.tensors import Factors, lora_layers, lora_tensors

_OWN = "pruned/"


class NotPrivate(ValueError):
    """Which ranks a client gives up depends on its data, and nothing hides that."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one client in one round; empty where no round asks to give some up.

    Attributes:
        own: by layer, the rank that it trains, of those that it was sent.
        asked: what it is asked; None for nothing.
        layers: as they are when the round begins, without what was given up before.
    """

    own: Mapping[str, int] = field(default_factory=dict)
    asked: PruningRule | None = None
    layers: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(cls, assignment: Assignment, kept: Tensors) -> Ranks:
        """Return the ranks for an assignment.

        Args:
            assignment: its broadcast asks to give ranks up, if the round does.
            kept: what the client kept of earlier rounds.

        Raises:
            NotPrivate: if the assignment is private.
        """
        sent = assignment.broadcast
        asked = pruning_of(sent.extra)
        if asked is None:
            return cls()
        if assignment.private:
            raise NotPrivate(
                "which ranks a client gives up depends on its data, which privacy does not cover; "
                "leave prune out, or run without privacy"
            )
        layers = lora_layers(sent.tensors)
        own = {
            name: min(len(f.a), int(kept.get(_OWN + name, len(f.a)))) for name, f in layers.items()
        }
        return cls(own, asked, lora_layers(cut(sent.tensors, own)))

    def start(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return what training starts from: zeros where the client has no ranks any more."""
        found = dict(tensors)
        for name, rank in self.own.items():
            for factor, ranks in self._first(name, rank, tensors).items():
                found[factor] = torch.where(ranks, tensors[factor], 0)
        return found

    def masks(self, params: Tensors) -> dict[str, Tensor]:
        """Return which entries train, of layers of which some do not."""
        found = {}
        for name, rank in self.own.items():
            for factor, ranks in self._first(name, rank, params).items():
                if not bool(ranks.all()):
                    found[factor] = ranks.expand_as(params[factor])
        return found

    def penalty(self, params: Tensors) -> Tensor | None:
        """Return ``weight |B_tail| |A_tail|``, summed over the layers; None for nothing.

        The tail are the ranks that a layer may give up in this round.
        """
        if self.asked is None or not self.asked.weight:
            return None
        sizes = [
            self._tail(name, params[a], params[b])
            for name, a, b in self._names()
            if a in params and b in params and self.asked.below(self.own[name]) < self.own[name]
        ]
        return self.asked.weight * torch.stack(sizes).sum() if sizes else None

    def after(self, trained: Tensors) -> dict[str, int]:
        """Return the ranks by layer after the round: lower where the tail has become smaller.

        Args:
            trained: the values that training ended with.
        """
        found = {}
        for name, a, b in self._names():
            assert self.asked is not None
            own, lower, before = self.own[name], self.asked.below(self.own[name]), self.layers[name]
            smaller = bool(
                self._tail(name, trained[a], trained[b]) < self._tail(name, before.a, before.b)
            )
            found[name] = lower if smaller else own
        return found

    def _tail(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Return ``|B| |A|`` of the ranks that a layer may give up; 0 where it may give up none."""
        assert self.asked is not None
        own = self.own[name]
        lower = self.asked.below(own)
        size: Tensor = b[:, lower:own].norm() * a[lower:own].norm()
        return size

    def _names(self) -> list[tuple[str, str, str]]:
        """Return the layers that are the client's, each with the names of its A and B."""
        return [(n, *list(lora_tensors({n: f}))[:2]) for n, f in self.layers.items()]  # type: ignore[misc]

    def _first(self, name: str, rank: int, tensors: Tensors) -> dict[str, Tensor]:
        """Return, of a layer's factors that are there, which of their ranks are the client's."""
        a, b = list(lora_tensors({name: self.layers[name]}))[:2]
        found = {}
        for factor, axis in ((a, 0), (b, 1)):
            if factor in tensors:
                tensor = tensors[factor]
                ranks = torch.arange(tensor.shape[axis], device=tensor.device) < rank
                found[factor] = ranks[:, None] if axis == 0 else ranks
        return found


def kept(ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return a client's ranks as tensors of its own."""
    return {_OWN + name: torch.tensor(rank) for name, rank in ranks.items()}
