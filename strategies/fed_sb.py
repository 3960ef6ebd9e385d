"""Fed-SB: clients train an r x r core between two frozen factors, so that averaging it is exact.

Source: arXiv 2502.15436, on the adapter of LoRA-SB, arXiv 2411.19557. How the paper makes the
factors in a federation is the adapter's matter here: from the run's seed, or from public data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.cores import CORE_AND_HEAD, check_cores
from strategies.tensors import Weighting, weighted_mean


@dataclass(frozen=True, slots=True)
class FedSB:
    """Clients train the cores and head between frozen factors; the server averages them.

    The mean of ``B C_k A`` is ``B mean(C_k) A``. A client sends ``rank²`` values a layer, however
    large the layer is; it receives the whole adapter, factors included, every round, or the cores
    alone where it holds the factors (``downlink: held``). Noise of DP enters linearly, and in
    rank² dimensions instead of rank (in + out).

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"additive", "core", "exact", "mean-only", "private", "shared-gauge", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if a layer of the adapter has no core.
        """
        check_cores(adapter)
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which the cores and the head are to be trained."""
        return Broadcast(state.adapter, trainable=CORE_AND_HEAD)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with averaged cores and head. The factors are the same tensors.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        return ServerState({**state.adapter, **mean}, state.auxiliary)
