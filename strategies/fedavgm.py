"""FedAvgM: momentum at the server.

Source: arXiv 1909.06335 (section 4.3); one of the family of arXiv 2003.00295.
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
class FedAvgM(FedOpt):
    """The server adds the running sum of the rounds' mean changes, which smooths unlike cohorts.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
        learning_rate: > 0; 1 with momentum 0 is the inner strategy.
        momentum: decay of the sum, in [0, 1). At 0.9 a steady change counts ten times in the end.
    """

    learning_rate: Annotated[float, Range(0, open_low=True, open_high=True)] = 1.0
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9

    mean_options: ClassVar[Mapping[str, Any]] = {"momentum": 0.0}

    def first(self) -> dict[str, float]:
        """Return the sum before round 1."""
        return {"m": 0.0}

    def step(self, delta: Tensor, moments: Tensors, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``v = momentum v + Delta``, scaled, and ``v``."""
        m = self.momentum * moments["m"] + delta
        return self.learning_rate * m, {"m": m}
