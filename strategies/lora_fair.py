"""LoRA-FAIR: average both factors, then correct B so that B A is nearer to the mean product.

Source: arXiv 2411.14961. The paper finds the correction by descent on a similarity between the
products; here it is the minimiser of ``|M - (B + D) A|^2 + regularization |D|^2`` in closed form, M
being the mean product: ``D = (M - B A) A^T (A A^T + regularization I)^-1``. Scaling takes no part:
it is one factor of both products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.drift import AveragingError, norm
from strategies.plugins import Range
from strategies.tensors import ALL_TRAINED, Weighting, lora_layers, weighted_mean


@dataclass(frozen=True, slots=True)
class LoRAFAIR:
    """Clients train A, B and head; the server averages each, and corrects B for what that loses.

    What no B can mend is what lies outside of the rows of the mean A. ``averaging_error`` tells
    what averaging lost, ``corrected_error/LAYER`` what of it is left. The changes of a round's
    clients are kept until its end: memory grows with their number. No product is formed.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
        regularization: how much B is held, > 0, against the squares of A's singular values; large
            ones are FedAvg. The paper's is 0.01.
    """

    weighting: Weighting = "examples"
    regularization: Annotated[float, Range(0, open_low=True, open_high=True)] = 0.01

    capabilities: ClassVar[frozenset[str]] = frozenset({"private"})
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, all of it to be trained but the scalings."""
        return Broadcast(state.adapter, trainable=ALL_TRAINED)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with the means, and B corrected.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        error = AveragingError(state.adapter, self.weighting, whole=True)
        mean = weighted_mean(error.watching(updates), state.adapter, self.weighting)
        averaged = {**state.adapter, **mean}
        adapter, metrics = dict(averaged), error.metrics(averaged)
        for layer, (u, v) in error.deviations(averaged).items():
            b, a = averaged[f"{layer}.lora_B.weight"], averaged[f"{layer}.lora_A.weight"].double()
            correction = _correction(u, v, a, self.regularization)
            adapter[f"{layer}.lora_B.weight"] = (b.double() + correction).to(b.dtype)
            lost, left = norm(u, v), norm(torch.cat([u, -correction], dim=1), torch.cat([v, a]))
            before = metrics[f"averaging_error/{layer}"]
            metrics[f"corrected_error/{layer}"] = before * left / lost if lost else 0.0
        return ServerState(adapter, state.auxiliary, metrics)


def _correction(u: Tensor, v: Tensor, a: Tensor, regularization: float) -> Tensor:
    """Return ``u v a^T (a a^T + regularization I)^-1``, ``[out, rank]``."""
    gram = a @ a.T + regularization * torch.eye(a.shape[0], dtype=a.dtype)
    solved: Tensor = torch.linalg.solve(gram, (u @ (v @ a.T)).T)
    return solved.T
