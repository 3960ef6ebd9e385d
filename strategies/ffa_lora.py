"""FFA-LoRA: A is frozen and shared, so that averaging B is exact.

Source: arXiv 2403.12313.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.tensors import B_AND_HEAD, Weighting, lora_layers, refactored, weighted_mean


@dataclass(frozen=True, slots=True)
class FFALoRA:
    """Clients train B and head under one frozen A; the server averages them.

    The mean of the products is the product of the mean, because all clients share A. Under DP the
    noise enters linearly: there is no product of two noises.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
        orthonormal: before round 1, replace A by an orthonormal basis of its own row space (no new
            random numbers; a product that is there already is kept). Under plain SGD this is
            FedSVD from its first refactorisation on. Off, A stays as it was drawn, as in the paper.
        row_scale: norm of the rows of an orthonormal A, > 0; ``1/sqrt(3)`` is the norm of PEFT's
            initialisation, so that learning rates stay comparable.
    """

    weighting: Weighting = "examples"
    orthonormal: bool = False
    row_scale: Annotated[float, Range(0, open_low=True, open_high=True)] = 1.0

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"additive", "exact", "mean-only", "private", "shared-gauge", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.row_scale != 1.0 and not self.orthonormal:
            raise ValueError(
                f"row_scale is the norm of orthonormal rows, got {self.row_scale:g} without "
                "orthonormal; set orthonormal: true or leave row_scale out"
            )

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(
            refactored(adapter, self.row_scale) if self.orthonormal else dict(adapter)
        )

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which B and the head are to be trained."""
        return Broadcast(state.adapter, trainable=B_AND_HEAD)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with B and head replaced by their weighted means. A is the same tensor.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        return ServerState({**state.adapter, **mean}, state.auxiliary)
