"""FedAvg on adapters (FedIT): every tensor is trained, and averaged on its own.

Source: arXiv 1602.05629 (Algorithm 1); on LoRA, arXiv 2305.05644.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.drift import AveragingError
from strategies.tensors import ALL_TRAINED, Weighting, weighted_mean


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Clients train A, B and head; the server averages each of them.

    Averaging the factors is not averaging their products: with weights ``p_k`` the result differs
    from the mean change of the base by ``sum p_k (B_k - B)(A_k - A)``, B and A being the averages.
    It is exact where clients differ in one factor only. How much a round lost is its metric
    ``averaging_error``; see :class:`strategies.drift.AveragingError`.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
        averaging_error: tell that metric. It takes the server ten times as long as the mean and
            more: tens of milliseconds for a layer of 4096 x 4096, rank 16 and 8 clients.
    """

    weighting: Weighting = "examples"
    averaging_error: bool = True

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"additive", "mean-only", "private", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used."""
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, all of it to be trained but the scalings."""
        return Broadcast(state.adapter, trainable=ALL_TRAINED)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with every trained tensor replaced by its weighted mean.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        if not self.averaging_error:
            mean = weighted_mean(updates, state.adapter, self.weighting)
            return ServerState({**state.adapter, **mean}, state.auxiliary)
        error = AveragingError(state.adapter, self.weighting)
        mean = weighted_mean(error.watching(updates), state.adapter, self.weighting)
        adapter = {**state.adapter, **mean}
        return ServerState(adapter, state.auxiliary, error.metrics(adapter))
