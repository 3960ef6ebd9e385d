"""MAS (1711.09601, eq. 2 to 4): what moves the model's outputs on earlier tasks' texts stays put.

The importance of an entry is the mean size of the gradient of the squared length of the outputs, of
each example by itself. It needs no labels. Of a text that is continued or tagged, the length is the
mean over the tokens that are learned. Each client sends its mean, and the memory has the examples'
mean over all of them. It reads texts: refused under DP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from clients.regularizers import anchors
from strategies.base import Tensors
from strategies.plugins import Range

if TYPE_CHECKING:  # torch is enough for what a config asks
    from clients.data import Batch
    from clients.reading import Reading


@dataclass(frozen=True)
class MAS(anchors.Anchored):
    """Entries are held to earlier tasks' values by how much the model's outputs depend on them.

    Importances of tasks add up, and all are held to the newest result.

    Attributes:
        weight: lambda, >= 0; 0 turns the penalty off, and the memory still grows. 1 is the paper's.
    """

    weight: Annotated[float, Range(0)] = 1.0

    def consolidate_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return the mean size of the gradient of the outputs' squared length on each example."""

        def lengths(batch: Batch) -> Tensor:
            logits, labels = reading.aligned(reading.model(batch), batch)
            if reading.allowed is not None:
                logits = logits[..., reading.allowed.to(logits.device)]
            learned = (labels != -100).to(logits.dtype)
            squares: Tensor = logits.square().sum(2) * learned
            return squares.sum(1) / learned.sum(1).clamp(min=1)

        return anchors.mean_of_examples(self.kind, reading.gradients(lengths), torch.abs)
