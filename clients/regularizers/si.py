"""SI (1703.04200, eq. 3 to 5): what lowered the loss while earlier tasks were learned stays put.

Each client adds up, step by step, ``-gradient * change``: how much of the fall of its loss each
entry accounts for. Gradients and changes are what training releases anyway, so under example-level
DP nothing more is spent. At the end it divides by the square of how far the result lies from where
it first began, and sends that; the memory has the mean over all clients. What it added up never
leaves it.

Differences from the paper, which has one learner: the way is the clients' own, whose steps average
to a shorter one, so that importances are larger than one learner's. A client that was asked in half
of the rounds has added up half of a way, and one that never was has none. The gradient of SI's own
penalty is taken out, as the official code does; of other regularizers it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from clients.regularizers import anchors, recall
from strategies.base import Tensors
from strategies.plugins import Range

_PATH, _FIRST = "path", "first"


@dataclass(frozen=True)
class SI(anchors.Anchored):
    """Entries are held to earlier tasks' values by how much they did to learn these tasks.

    Importances of tasks add up, and all are held to the newest result.

    Attributes:
        weight: c, >= 0; 0 turns the penalty off, and the memory still grows. 0.1 is the paper's for
            split MNIST.
        damping: xi, > 0, added to the squared distance: entries that hardly moved do not matter.
    """

    weight: Annotated[float, Range(0)] = 0.1
    damping: Annotated[float, Range(0, open_low=True)] = 1e-3

    def observe(self, grads: Tensors, before: Tensors, after: Tensors, memory: Tensors) -> Tensors:
        """Return the memory with one step more of the way, and with where it began."""
        grown = dict(memory)
        for name, gradient in grads.items():
            own = gradient.float()
            if self.weight:
                held = anchors.pull(self.kind, name, before[name].float(), memory)
                own = own - 2 * self.weight * held
            step = -own * (after[name].float() - before[name].float())
            known = memory.get(f"{_PATH}/{name}")
            grown[f"{_PATH}/{name}"] = step if known is None else known + step
            if known is None:
                grown[f"{_FIRST}/{name}"] = before[name].float().clone()
        return grown

    def consolidate_observed(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return ``path / (distance^2 + damping)`` of every tensor that travels.

        Zeros at a client that never trained.
        """
        paths, firsts = recall(memory, _PATH), recall(memory, _FIRST)
        found = {}
        for name, tensor in params.items():
            if name in paths:
                away = (tensor.float() - firsts[name]).square()
                found[f"{self.kind}/{name}"] = paths[name] / (away + self.damping)
            else:
                found[f"{self.kind}/{name}"] = torch.zeros_like(tensor, dtype=torch.float32)
        return found
