"""One round of an exact strategy at the server, and the same through the layer's dense product."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies import STRATEGIES
from strategies.base import ClientSpec, ServerState, Setting, Strategy, Tensors, Update, beneath
from strategies.tensors import lora_layers

Adapters = list[dict[str, Tensor]]
Product = tuple[Tensor, Tensor]
A, B, CORE, SCALING = (
    f"layer.{x}" for x in ("lora_A.weight", "lora_B.weight", "lora_core.weight", "scaling")
)
SPLITTING = ("fedsvd", "flexlora")
"""Whose published code decomposes the product; of the others it is the mean alone."""


def exact() -> list[str]:
    """Return the strategies that make the mean of the clients' products, as they come."""
    plugins = [STRATEGIES.get(name) for name in STRATEGIES.names()]
    free = [p for p in plugins if not any(o.required for o in p.options.values())]
    return [p.name for p in free if "exact" in p.build().capabilities]


def inputs(size: int, num_adapters: int, rank: int, *, core: bool = False) -> Adapters:
    """Return adapters of one square layer.

    Column j of B is scaled by 0.8^j: a trained adapter's singular values decay, and where those
    next to the cut are equal the best approximation, and so the comparison, is not unique.
    """
    generator = torch.Generator().manual_seed(0)
    decay = 0.8 ** torch.arange(rank)
    adapters: Adapters = []
    for _ in range(num_adapters):
        a = torch.randn(rank, size, generator=generator) / math.sqrt(size)
        b = torch.randn(size, rank, generator=generator) * decay
        between = {CORE: torch.randn(rank, rank, generator=generator)} if core else {}
        adapters.append({A: a, B: b, SCALING: torch.tensor(2.0), **between})
    return adapters


@dataclass(frozen=True)
class Round:
    """What a server has when a round's updates are there."""

    strategy: Strategy
    state: ServerState
    updates: Sequence[Update]
    splits: bool

    @classmethod
    def of(cls, name: str, size: int, num_clients: int, rank: int) -> Round:
        """Return a round in which each client trained what the strategy asks for."""
        strategy = STRATEGIES.get(name).build()
        adapters = inputs(size, num_clients, rank, core="core" in strategy.capabilities)
        # a run begins with B = 0, but where B is frozen
        first = adapters[0] if CORE in adapters[0] else {**adapters[0], B: torch.zeros(size, rank)}
        state = strategy.init(first, Setting(num_clients, num_clients))
        trained = strategy.broadcast(state, ClientSpec("anyone")).trainable
        updates = [
            Update(
                f"{n:03}", 1, "", {x: t for x, t in one.items() if re.fullmatch(trained, x)}, 100
            )
            for n, one in enumerate(adapters)
        ]
        return cls(strategy, state, updates, name in SPLITTING)

    def factored(self) -> ServerState:
        """Aggregate as weft does."""
        return self.strategy.aggregate(self.state, self.updates)

    def dense(self) -> Tensor | Product:
        """Form each client's product, their mean, and decompose it where the method does."""
        start = self.state.adapter
        size = (len(start[B]), start[A].shape[1])
        rank, mean = len(start[A]), torch.zeros(size)
        for update in self.updates:
            b, a = _factors({**start, **update.tensors})
            mean.addmm_(b, a, alpha=1 / len(self.updates))
        return split(mean, rank) if self.splits else mean


def product(state: ServerState) -> Product:
    """Return the factors of all that a state adds to the layer."""
    parts = [_factors(state.adapter)]
    lying = beneath(state.auxiliary)
    parts += [
        (f.b.double() * f.scaling.double(), f.a.double())
        for f in (lora_layers(lying).values() if lying else ())
    ]
    return torch.cat([b.double() for b, _ in parts], 1), torch.cat([a.double() for _, a in parts])


def _factors(adapter: Tensors) -> Product:
    b = adapter[B] @ adapter[CORE] if CORE in adapter else adapter[B]
    return b * adapter[SCALING], adapter[A]


def split(dense: Tensor, rank: int) -> Product:
    """Return the factors of a dense product at a rank, the right one with orthonormal rows."""
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def largest_difference(ours: Product, theirs: Tensor | Product) -> float:
    """Return the largest entry of the difference of two products over the largest of the second.

    In blocks of rows: the comparison itself needs no d x d memory.
    """
    difference = largest = 0.0
    for start in range(0, len(ours[0]), 256):
        rows = slice(start, start + 256)
        mine = ours[0][rows].double() @ ours[1].double()
        if isinstance(theirs, Tensor):
            peer = theirs[rows].double()
        else:
            peer = theirs[0][rows].double() @ theirs[1].double()
        difference = max(difference, float((mine - peer).abs().max()))
        largest = max(largest, float(peer.abs().max()))
    return difference / largest
