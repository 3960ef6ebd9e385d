"""FedSVD: clients train B; the server averages it and makes A orthonormal by an SVD of B A.

Source: arXiv 2505.12805 (Algorithm 1). Three differences from the authors' code:

* The SVD is taken in factored form (QR of both factors, SVD of the small core), never of the dense
  product. Where the dense one is well defined the two agree; with a rank-deficient B the dense one
  fills A with directions that no client ever trained, ours stays in A's row space.
* Signs are canonical, and only the server takes the SVD: two BLAS builds need not find the same.
  The new A is the old one times an r x r matrix (:mod:`strategies.turning`), so that a client
  that holds the old one can be sent that instead of A (``downlink: held``).
* The head is trained where the run trains heads; the paper freezes it.

What to expect: the new row space is the old one, ``A_new = Q A_old`` with an orthogonal ``Q``. With
plain SGD, also clipped and with noise, FedSVD is therefore FFA-LoRA with an orthonormal A from the
first refactorisation on; use ``ffa-lora`` with ``orthonormal: true`` as the control. With Adam the
basis matters and the two differ. An orthonormal A has rows ``sqrt(3)`` times as long as PEFT's
initialisation, so the learning rate wants tuning, or ``row_scale: 0.577``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.tensors import B_AND_HEAD, Weighting, lora_layers, refactored, weighted_mean
from strategies.turning import ROTATION, turned


@dataclass(frozen=True, slots=True)
class FedSVD:
    """Clients train B and head; the server averages B and re-splits B A with orthonormal rows of A.

    The product B A is unchanged by the re-split, whatever the scaling. The number of rounds done
    is ``round`` in the state's auxiliary tensors; ``rotation/NAME`` is what turned A in the last.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
        every: refactorise after every so many rounds, >= 1; 1 is the paper's. In the rounds between
            it is FFA-LoRA. A round without updates advances the count and does not refactorise.
        orthonormal: also refactorise before round 1. Off, round 1 runs with A as it was drawn,
            as in the paper.
        row_scale: norm of the rows of A after a refactorisation, > 0; 1 is the paper's, and
            ``1/sqrt(3)`` the norm of PEFT's initialisation.
    """

    weighting: Weighting = "examples"
    every: Annotated[int, Range(1)] = 1
    orthonormal: bool = False
    row_scale: Annotated[float, Range(0, open_low=True, open_high=True)] = 1.0

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
        first = refactored(adapter, self.row_scale) if self.orthonormal else dict(adapter)
        return ServerState(first, {"round": torch.tensor(0)})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which B and the head are to be trained."""
        return Broadcast(state.adapter, trainable=B_AND_HEAD)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with averaged B and head, refactorised when its round has come.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        mean = weighted_mean(updates, state.adapter, self.weighting)
        done = state.auxiliary["round"] + 1
        adapter: dict[str, Tensor] = {**state.adapter, **mean}
        turns: dict[str, Tensor] = {}
        if mean and int(done) % self.every == 0:
            adapter, turns = turned(adapter, self.row_scale)
        kept = {n: t for n, t in state.auxiliary.items() if not n.startswith(ROTATION)}
        made = {ROTATION + name: turn for name, turn in turns.items()}
        return ServerState(adapter, {**kept, **made, "round": done})
