"""SD-LoRA: a new task freezes what was learned as directions, and trains their magnitudes anew.

Source: arXiv 2501.13198; the adapter is :mod:`clients.adapters.sd_lora`. The paper is not about
federations: what is trained is averaged tensor by tensor, as FedAvg does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.directions import directed_layers, with_task
from strategies.tensors import ALL_TRAINED, Weighting, weighted_mean


@dataclass(frozen=True, slots=True)
class SDLoRA:
    """Clients train the newest pair, all magnitudes and the head; the server averages each.

    A run that goes on from a version (``start: continue``) is a new task: what that version learned
    becomes a frozen direction of its own, with the same product, and a new pair of the same rank
    begins at zero. The adapter grows by its rank with every task. Averaging is inexact, as
    FedAvg's.

    Attributes:
        new_task: false goes on training the newest pair: more rounds of the same task.
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    new_task: bool = True
    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"additive", "directions", "mean-only", "private", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {"new_task": False}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; the product is that of ``adapter``.

        Raises:
            NotLowRank: if a layer of the adapter has no magnitudes.
        """
        directed_layers(adapter)
        return ServerState(with_task(adapter, setting.seed) if self.new_task else dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter; its directions of earlier tasks stay as they are."""
        return Broadcast(state.adapter, trainable=rf"(?!.*\.past_[AB]\.weight$){ALL_TRAINED}")

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with every trained tensor replaced by its weighted mean.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        return ServerState({**state.adapter, **mean}, state.auxiliary)
