"""FedYogi: Yogi at the server.

Source: arXiv 2003.00295 (Algorithm 2, line 12).
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
class FedYogi(FedOpt):
    """The server takes a Yogi step: Adam whose running square moves by no more than a change's.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
        learning_rate: > 0; see ``fedadam``.
        beta1: decay of the running mean of changes, in [0, 1); 0 has no momentum.
        beta2: 1 minus how fast the running square follows, in [0, 1).
        tau: added to its root, and squared where the square starts, > 0.
    """

    learning_rate: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.99
    tau: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3

    mean_options: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 2e12,
        "beta1": 0.0,
        "tau": 1e12,
    }

    def first(self) -> dict[str, float]:
        """Return the moments before round 1."""
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Tensor, moments: Tensors, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Yogi's step and its next moments."""
        square = delta.square()
        m = self.beta1 * moments["m"] + (1 - self.beta1) * delta
        v = moments["v"] - (1 - self.beta2) * square * (moments["v"] - square).sign()
        return self.learning_rate * m / (v.sqrt() + self.tau), {"m": m, "v": v}
