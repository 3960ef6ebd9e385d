"""FedAdagrad: Adagrad at the server.

Source: arXiv 2003.00295 (Algorithm 2, line 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.server_optimizer import FedOpt


@dataclass(frozen=True, slots=True)
class FedAdagrad(FedOpt):
    """The server takes an Adagrad step: smaller ones where changes were large in sum.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
        learning_rate: > 0; see ``fedadam``.
        beta1: decay of the running mean of changes, in [0, 1); the paper's experiments have 0.
        tau: added to the root of the sum of squares, and squared where that starts, > 0.
    """

    learning_rate: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    tau: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3

    mean_options: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e12, "tau": 1e12}

    def first(self) -> dict[str, float]:
        """Return the moments before round 1."""
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Tensor, moments: Tensors, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Adagrad's step and its next moments."""
        m = self.beta1 * moments["m"] + (1 - self.beta1) * delta
        v = moments["v"] + delta.square()
        return self.learning_rate * m / (v.sqrt() + self.tau), {"m": m, "v": v}
