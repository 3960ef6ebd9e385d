"""RoLoRA: B is trained in one round and A in the next, so that every mean is exact and A moves.

Source: arXiv 2502.01755.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.tensors import A_AND_HEAD, B_AND_HEAD, Weighting, lora_layers, weighted_mean


@dataclass(frozen=True, slots=True)
class RoLoRA:
    """Clients train B and head in odd rounds, A and head in even ones; the server averages them.

    The mean of the products is the product of the means in every round, because clients share the
    other factor; unlike with a frozen A, its row space moves. B comes first: while it is zero, A
    has no gradient. A run that continues another begins with B again.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"exact", "mean-only", "private", "shared-gauge", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter), {"round": torch.tensor(0)})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which one factor and the head are to be trained."""
        odd = int(state.auxiliary["round"]) % 2 == 0
        return Broadcast(state.adapter, trainable=B_AND_HEAD if odd else A_AND_HEAD)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with the round's factor and head averaged; the next trains the other.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        done = state.auxiliary["round"] + 1
        return ServerState({**state.adapter, **mean}, {**state.auxiliary, "round": done})
