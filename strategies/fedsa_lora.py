"""FedSA-LoRA: A is shared, B stays at the client.

Source: arXiv 2410.01463. The paper also keeps the head at the client: ``head: personal``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.tensors import ALL_TRAINED, Weighting, lora_layers, weighted_mean


@dataclass(frozen=True, slots=True)
class FedSALoRA:
    """Clients train A, B and head; the server averages A and head, each client keeps its own B.

    Personalisation: there is no global model. A version's B is the one that a client which has not
    trained yet starts from, and it needs no other; after a mean, a client's B goes on under an A
    that is not quite the one that it was trained with.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"additive", "mean-only", "personal", "private", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, all of it to be trained but the scalings, B to be kept."""
        return Broadcast(state.adapter, trainable=ALL_TRAINED, personal=r".*\.lora_B\..*")

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with A and head averaged. B is the same tensor.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        return ServerState({**state.adapter, **mean}, state.auxiliary)
