"""How far one example may move the sum of gradients: what each is multiplied by before it is added.

Whatever the mode, one example changes the sum by at most a norm of ``bound``, over all parameters
together; the noise is a multiple of that, so that no mode costs more than another. *Flat* scales
down what is longer (1607.00133). *Per layer* gives each of K layers ``bound / sqrt(K)``
(1710.06963, section 3). *Automatic* gives all of them about the bound, so that it and the learning
rate are one number (AUTO-S of 2206.07136). *Quantile* moves the bound to where a wanted share of
the norms lies below it (1905.03871); what it learns for that is released with noise of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.assignment import Clipping

SMALLEST = 1e-9
"""Of a bound, and of what ``automatic`` adds to norms.

Norms are measured in float32, in which entries below 1e-19 have none: a gradient whose norm is not
seen is not clipped either. What is missed of a norm lies millions of times below this.
"""

_ROUNDING = 1 + 1e-6  # a clipped gradient may not exceed its bound by float32 rounding either


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to: both factors of an adapted layer are of one."""
    layer, _, _ = name.rpartition(".lora_")
    return layer or name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Clip:
    """The clipping of one step.

    Attributes:
        clipping: the mode, with its options.
        names: of the parameters, in the order of every ``norms``.
        bound: on the norm of what one example adds, over all parameters, >= :data:`SMALLEST`.

    Raises:
        ValueError: if that, or what ``automatic`` adds, is smaller.
    """

    clipping: Clipping
    names: Sequence[str]
    bound: float

    def __post_init__(self) -> None:
        for name, value in (("bound", self.bound), ("stability", self.clipping.stability)):
            if not value >= SMALLEST:
                raise ValueError(
                    f"{name} must be >= {SMALLEST:g}, got {value}: of far shorter gradients no "
                    "norm is measured, and nothing would be clipped"
                )

    def factors(self, norms: Tensor) -> Tensor:
        """Return what each example's gradient of each parameter is multiplied by.

        An example with a norm that is infinite or no number counts as zero, whole.

        Args:
            norms: of the examples' gradients, float32 ``[parameters, batch]``.

        Returns:
            ``[parameters, batch]``, from 0 to 1; above 1 with ``automatic``.
        """
        if self.clipping.mode == "per-layer":
            layers = sorted({layer_of(name) for name in self.names})
            rows = torch.tensor([layers.index(layer_of(name)) for name in self.names])
            rows = rows.to(norms.device)
            squares = norms.new_zeros(len(layers), norms.shape[1])
            whole = squares.index_add_(0, rows, norms.square()).sqrt()
            found = (self.bound / math.sqrt(len(layers)) / (whole * _ROUNDING)).clamp(max=1)[rows]
        else:
            whole = norms.norm(dim=0)
            if self.clipping.mode == "automatic":
                found = self.bound / ((whole + self.clipping.stability) * _ROUNDING)
            else:
                found = (self.bound / (whole * _ROUNDING)).clamp(max=1)
            found = found.expand_as(norms)
        lost = ~norms.isfinite().all(dim=0) | ~whole.isfinite().reshape(-1, norms.shape[1]).all(0)
        return found.masked_fill(lost, 0)

    def vote(self, norms: Tensor) -> Tensor:
        """Return the examples' votes: plus a half for each norm within the bound, minus for others.

        One example changes it by a half: what the noise of :func:`count_noise` hides.
        """
        within: Tensor = norms.norm(dim=0) <= self.bound
        return within.double().sum() - 0.5 * norms.shape[1]


def gradient_noise(clipping: Clipping, noise_multiplier: float) -> float:
    """Return the noise multiplier of the gradients, so that a whole step has ``noise_multiplier``.

    A step of ``quantile`` is one Gaussian mechanism over gradients, with z₁, and votes, with
    deviation s and sensitivity 1/2: together it has z where 1/z² = 1/z₁² + 1/(2s)² (1905.03871,
    theorem 1). The votes get the share of 1/z² that the option says, exactly. What is on the ledger
    is z, whatever the mode.
    """
    if clipping.mode != "quantile":
        return noise_multiplier
    return noise_multiplier / math.sqrt(1 - clipping.share)


def count_noise(clipping: Clipping, noise_multiplier: float) -> float:
    """Return the standard deviation of the noise on the votes; see :func:`gradient_noise`."""
    return noise_multiplier / (2 * math.sqrt(clipping.share))


def moved(clipping: Clipping, bound: float, votes: float, expected: float) -> float:
    """Return the next step's bound: up where too few norms are within it, down where too many.

    Args:
        clipping: a ``quantile``.
        bound: this step's; the next is :data:`SMALLEST` at least.
        votes: noised.
        expected: number of examples a step; the true number is private.
    """
    within = min(max(votes / expected + 0.5, 0.0), 1.0)
    return max(bound * math.exp(-clipping.rate * (within - clipping.quantile)), SMALLEST)
