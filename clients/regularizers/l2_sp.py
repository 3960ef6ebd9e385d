"""L2-SP (1802.01483): stay near the point that the run started from.

As in the paper the anchor is the start of the fine-tuning, here of the run: FedProx (``proximal``)
holds a client against its round's broadcast, which moves on, and lets the rounds together go as far
as they like. What differs from the paper: a fresh head is held too, against its first values, which
are all but zero; the paper decays it to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from clients.regularizers import Beginning, Regularizer, namespaced
from strategies.base import Tensors
from strategies.plugins import Range

_START = "start"


@dataclass(frozen=True)
class L2SP(Regularizer):
    """Squared distance to the run's start, so that a task does not undo those before it.

    The distance is between factors, not between products, as that of ``proximal``: a strategy that
    factors B @ A anew in every round (FedSVD, FlexLoRA) is refused.

    Attributes:
        weight: strength, >= 0; 0 does nothing. The gradient is ``weight * (theta - start)``.
    """

    holds: ClassVar[Literal["", "tensors", "outputs"]] = "tensors"

    weight: Annotated[float, Range(0)] = 0.01

    def begin(self, start: Beginning, memory: Tensors) -> Tensors:
        """Return the start's tensors, ``start/NAME``; none where ``weight`` is 0."""
        return namespaced(start.adapter, _START) if self.weight else {}

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``weight / 2 * ||theta - start||^2`` over what is trained (eq. 3), or None."""
        anchored = [(name, f"{_START}/{name}") for name in sorted(params)]
        pairs = [(params[name], memory[key]) for name, key in anchored if key in memory]
        if self.weight == 0 or not pairs:
            return None
        distances = [(now.float() - then.float()).square().sum() for now, then in pairs]
        return self.weight / 2 * torch.stack(distances).sum()

    def consolidate(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return no memory: the next run has a start of its own."""
        return {}
