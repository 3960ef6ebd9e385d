"""EWC (1612.00796, eq. 3) and online EWC (1805.06370): what the Fisher says mattered stays put.

The diagonal of the Fisher information at the task's result, from each example's own gradient: the
mean of the squares, which the square of a batch's mean gradient is not. After the task, of the
task's loss alone. Each client sends its mean, and the memory has the examples' mean over all of
them, as one client with all data would have it. Squared gradients of few examples tell of them:
refused under DP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from clients.regularizers import anchors
from strategies.base import Tensors
from strategies.plugins import Range

if TYPE_CHECKING:  # torch is enough for what a config asks
    from clients.data import Batch
    from clients.reading import Reading


@dataclass(frozen=True)
class EWC(anchors.Anchored):
    """Entries are held to earlier tasks' values by how much these tasks' losses depend on them.

    Attributes:
        weight: lambda, >= 0; 0 turns the penalty off, and the memory still grows.
        decay: null for one penalty a task, around its own result (EWC). A number from 0 to 1
            multiplies the older Fisher at each task's end, and all is held to the newest result
            (online EWC); 1 forgets nothing, 0 remembers the last task alone.
        labels: ``data`` for the gradients at the true labels (the empirical Fisher), ``model`` for
            labels drawn from what the model predicts (the Fisher itself, noisier by the draw).
    """

    weight: Annotated[float, Range(0)] = 100.0
    decay: Annotated[float | None, Range(0, 1)] = None
    labels: Literal["data", "model"] = "data"

    kind = "fisher"

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``weight / 2 * sum F (theta - theta*)^2``; None on a first task."""
        found = super().penalty(params, reference, memory)
        return None if found is None else found / 2

    def consolidate_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return the diagonal of the Fisher information on a client's examples, its mean."""
        generator = torch.Generator().manual_seed(reading.seed)

        def losses(batch: Batch) -> Tensor:
            if self.labels == "data":
                return reading.losses(batch)
            logits = reading.model(batch)
            drawn = replace(batch, labels=_drawn(reading, logits.detach(), batch, generator))
            return reading.model.example_losses(logits, drawn, reading.allowed)

        return anchors.mean_of_examples(self.kind, reading.gradients(losses), torch.square)


def _drawn(reading: Reading, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return labels as ``batch`` has them, drawn from what the model predicts in their place."""
    labels = batch.labels.clone()
    choices, places = reading.aligned(logits, replace(batch, labels=labels))  # a view of labels
    asked = places != -100
    rows = choices[asked]
    allowed = None if reading.kind == "causal-lm" else reading.allowed
    places[asked] = _sampled(reading.model.barred(rows, allowed), generator)
    return labels


def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return an index for each row of ``[rows, choices]``."""
    chances = torch.softmax(logits.double(), dim=1).cpu()
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
