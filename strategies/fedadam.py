"""FedAdam: Adam at the server.

Source: arXiv 2003.00295 (Algorithm 2, line 13).
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
class FedAdam(FedOpt):
    """The server takes an Adam step along the mean change of an inner strategy.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
        learning_rate: > 0. A step moves an entry by about this much, whatever clients did; the
            paper's 0.1 is for whole models, and this for factors of an adapter.
        beta1: decay of the running mean of changes, in [0, 1); 0 has no momentum.
        beta2: decay of their running square, in [0, 1).
        tau: added to its root, > 0: large ones make this a scaled mean.
        bias_correction: start from zero moments and correct for that, as Adam does; the paper
            starts the square at ``tau^2`` and does not.
    """

    learning_rate: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.99
    tau: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-3
    bias_correction: bool = False

    mean_options: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e12,
        "beta1": 0.0,
        "beta2": 0.0,
        "tau": 1e12,
    }

    def first(self) -> dict[str, float]:
        """Return the moments before round 1."""
        return {"m": 0.0, "v": 0.0 if self.bias_correction else self.tau**2}

    def step(self, delta: Tensor, moments: Tensors, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Adam's step and its next moments."""
        m = self.beta1 * moments["m"] + (1 - self.beta1) * delta
        v = self.beta2 * moments["v"] + (1 - self.beta2) * delta.square()
        mean, square = m, v
        if self.bias_correction:
            mean, square = m / (1 - self.beta1**count), v / (1 - self.beta2**count)
        return self.learning_rate * mean / (square.sqrt() + self.tau), {"m": m, "v": v}
