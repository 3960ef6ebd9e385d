"""FLoRA: the clients' factors are stacked beneath, and everyone starts a new adapter on top.

Source: arXiv 2409.05976 (section 3.2). Differences from the authors' code:

* The paper folds the stack into the base weights. Here the base is never changed: the stacks of all
  rounds lie beneath as one frozen adapter, which every version and every client has. It is stacked
  as long as its rank is below ``min(out, in)``, and the matrix itself from there on: both exact.
* Weights and scalings are on one factor only, once.

What to expect: a new A and B = 0 in every round cost progress where rounds are short, and what lies
beneath grows by the sum of the clients' ranks in every round and travels to every client: this is
for few clients and rounds. ``max_rank`` bounds it, and is no longer exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.products import (
    Best,
    RunningProduct,
    at_rank,
    beneath_tensors,
    best,
    captured,
    laid_beneath,
    product_means,
)
from strategies.tensors import ALL_TRAINED, Factors, Weighting, lora_layers, lora_tensors


@dataclass(frozen=True, slots=True)
class FLoRA:
    """Clients train A and B at their own ranks; the server lays the stacked mean beneath.

    Adapter and what lies beneath together change by the weighted mean of the products. After a
    round, A is drawn anew (as PEFT draws it, from the run's seed and the round) and B is zero.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1.
        max_rank: largest rank of what lies beneath, >= 1: the best approximation, with the share
            that was kept as ``captured_energy``. None keeps all, as in the paper.
    """

    weighting: Weighting = "examples"
    max_rank: Annotated[int | None, Range(1)] = None

    mean_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """Exact unless ``max_rank`` cuts."""
        exact = {"exact"} if self.max_rank is None else set[str]()
        return frozenset({"any-rank", "beneath", "private", "streaming"} | exact)

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; of ``setting``, the seed is kept.

        A product that is there already goes beneath, so that clients of every rank start from it.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        layers = lora_layers(adapter)
        there = {
            n: (f.b.double() * f.scaling.double(), f.a) for n, f in layers.items() if f.b.any()
        }
        empty = {n: Factors(f.a, torch.zeros_like(f.b), f.scaling) for n, f in layers.items()}
        counters = {"round": torch.tensor(0), "seed": torch.tensor(setting.seed)}
        lying = beneath_tensors(there, layers)
        return ServerState({**adapter, **lora_tensors(empty)}, {**lying, **counters})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter at the client's rank, all of it to be trained but the scalings."""
        return Broadcast(at_rank(state.adapter, client.rank), trainable=ALL_TRAINED)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with the mean product beneath, and a new adapter on top.

        Raises:
            BadUpdate: if the updates do not fit the adapter.
        """
        means, rest = product_means(updates, state.adapter, self.weighting)
        done = state.auxiliary["round"] + 1
        auxiliary = {**state.auxiliary, "round": done}
        if not means:
            return ServerState(state.adapter, auxiliary)
        layers = lora_layers(state.adapter)
        for name, mean in means.items():
            mean.scale(float(layers[name].scaling))
        lying, metrics = self._within(laid_beneath(state.auxiliary, means, layers))
        fresh = {
            name: Factors(
                _drawn(f.a, int(state.auxiliary["seed"]), int(done), name),
                torch.zeros_like(f.b),
                f.scaling,
            )
            for name, f in layers.items()
        }
        return ServerState(
            {**state.adapter, **rest, **lora_tensors(fresh)},
            {**auxiliary, **beneath_tensors(lying, layers)},
            metrics,
        )

    def _within(
        self, layers: Mapping[str, RunningProduct]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
        """Return the factors of what lies beneath, cut to the largest rank, and what was kept."""
        made: dict[str, tuple[Tensor, Tensor]] = {}
        cut: dict[str, Best] = {}
        for name, product in layers.items():
            made[name] = product.factors()
            if self.max_rank is not None:
                found = cut[name] = best(*made[name], self.max_rank)
                k = found.b.shape[1]
                made[name] = found.b, found.a[:k]
        one = torch.ones(())  # scalings are in the products
        return made, captured(cut, dict.fromkeys(cut, one)) if cut else {}


def _drawn(like: Tensor, seed: int, round_: int, layer: str) -> Tensor:
    """Return a new A: uniform in ±1/sqrt(in), which is PEFT's Kaiming initialisation."""
    text = f"flora\0{seed}\0{round_}\0{layer}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    bound = 1 / math.sqrt(like.shape[1])
    drawn = torch.empty(like.shape, dtype=torch.float32)
    drawn.uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
    return drawn.to(like.dtype)
