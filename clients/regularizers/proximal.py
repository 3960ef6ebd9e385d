"""FedProx (1812.06127): keep a client's adapter near the round's broadcast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from clients.regularizers import Regularizer
from strategies.base import Tensors
from strategies.plugins import Range


@dataclass(frozen=True)
class Proximal(Regularizer):
    """Squared distance to the broadcast, so that unlike clients do not drift apart.

    The distance is between factors, not between products: it depends on how B @ A is factored,
    unless A is shared and orthonormal (FedSVD), where ``||dB||`` is ``||dB @ A||``.

    Attributes:
        mu: strength, >= 0; 0 is FedAvg. The gradient is ``mu * (theta - reference)``.
    """

    mu: Annotated[float, Range(0)] = 0.01

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``mu / 2 * ||theta - reference||^2`` (eq. 2), or None where ``mu`` is 0."""
        if self.mu == 0 or not params:
            return None
        names = sorted(params)
        distances = [(params[n].float() - reference[n].float()).square().sum() for n in names]
        return self.mu / 2 * torch.stack(distances).sum()
