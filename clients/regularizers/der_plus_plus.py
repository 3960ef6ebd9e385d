"""DER++ (2004.07211): rehearse examples by the logits that they had, and by their labels.

Kept is what :mod:`clients.regularizers.replay` keeps, and the logits of the model that the client
had at the end of the round in which it kept them. Where it differs from the paper: one draw of kept
examples serves both terms of eq. 6, which has the same expectation for half the passes; and logits
are compared over the labels that took part in the softmax of their task, since those of labels to
come were random numbers then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from clients.regularizers import Regularizer, Rehearsal
from strategies.plugins import Range


@dataclass(frozen=True)
class DERPlusPlus(Regularizer):
    """A client holds examples of earlier tasks to their labels and to the logits that it kept.

    Attributes:
        size: examples that a client keeps at most, of all its tasks together, >= 1.
        batch: of these that go with every step, >= 1.
        alpha: what the squared distance of the logits counts, > 0.
        beta: what the cross entropy counts, >= 0; 0 is DER.
        labels: which take part in that: all that the client has ``seen``, or those of the example's
            own ``task``; see ``replay``.
    """

    size: Annotated[int, Range(1)] = 200
    batch: Annotated[int, Range(1)] = 8
    alpha: Annotated[float, Range(0, open_low=True)] = 0.5
    beta: Annotated[float, Range(0)] = 0.5
    labels: Literal["seen", "task"] = "seen"

    @property
    def rehearsal(self) -> Rehearsal:
        """What is kept."""
        return Rehearsal(self.size, self.batch, outputs=True, labels=self.labels)

    def rehearsal_loss(self, losses: Tensor, outputs: Tensor, kept: Tensor) -> Tensor:
        """Return ``alpha * mean (z - z_kept)^2 + beta * cross entropy`` of each example (eq. 6)."""
        there = kept.isfinite()
        apart = torch.where(there, outputs - kept.nan_to_num(), 0.0).square().flatten(1).sum(1)
        return self.alpha * apart / there.flatten(1).sum(1).clamp(min=1) + self.beta * losses
