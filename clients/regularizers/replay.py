"""Experience replay (1902.10486): train on a few examples of earlier tasks beside the new ones.

A client keeps a reservoir of its own examples (Vitter's algorithm R, algorithm 2 of the paper),
which never leaves it: see :mod:`clients.reservoir`. Where it differs from the paper: a task's
examples are offered to the reservoir once, at its end, since a task is here as a whole while it
lasts; so a batch is rehearsed from earlier tasks alone. Where a task brings labels, its own
examples are told apart from each other, and kept ones from all, whose rows of the head they train
too: that is ER-ACE (2104.05025, eq. 4), which does not push what was learned out of the way of what
is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from clients.regularizers import Regularizer, Rehearsal
from strategies.plugins import Range


@dataclass(frozen=True)
class Replay(Regularizer):
    """A client trains again on examples that it kept of earlier tasks.

    Attributes:
        size: examples that a client keeps at most, of all its tasks together, >= 1.
        batch: of these that go with every step, >= 1.
        weight: what they count beside the batch, > 0; the means of both are added.
        labels: which take part in the softmax of a kept example: all that its client has ``seen``,
            or those of its own ``task``, which is enough where the task is known at inference.
    """

    size: Annotated[int, Range(1)] = 200
    batch: Annotated[int, Range(1)] = 8
    weight: Annotated[float, Range(0, open_low=True)] = 1.0
    labels: Literal["seen", "task"] = "seen"

    @property
    def rehearsal(self) -> Rehearsal:
        """What is kept."""
        return Rehearsal(self.size, self.batch, labels=self.labels)

    def rehearsal_loss(self, losses: Tensor, outputs: Tensor, kept: Tensor) -> Tensor:
        """Return ``weight`` times the cross entropy."""
        return self.weight * losses
