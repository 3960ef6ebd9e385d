"""GPM (2103.09762): new tasks learn in directions of the inputs that earlier tasks do not use.

On an adapter: A's rows, and every gradient of A, are projected out of the space of earlier tasks'
inputs, so that ``B A x`` is nearly zero for their ``x`` whatever B learns. Each task is a new
adapter on top of the earlier ones (``start: stack``).

The first task's adapter is not held back, and its inputs are remembered when it ends: from the
second moments that clients send (:mod:`clients.input_spaces`). An optimizer that rescales entries,
as Adam does, would leave the space again: sgd does not, with momentum and weight decay too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from clients import input_spaces
from clients.input_spaces import A
from clients.regularizers import Regularizer, When
from strategies.base import Tensors, Update
from strategies.plugins import Range

if TYPE_CHECKING:  # it imports the regularizers
    from clients.reading import Reading

_TASKS = "tasks"


@dataclass(frozen=True)
class GPM(Regularizer):
    """What earlier tasks put into a layer, new tasks do not react to.

    Attributes:
        threshold: share of a task's squared inputs that the remembered directions must hold, in
            (0, 1].
        growth: by how much the share is larger for each further task, >= 0, up to 1.
    """

    threshold: Annotated[float, Range(0, 1, open_low=True)] = 0.97
    growth: Annotated[float, Range(0, 1)] = 0.003

    acts_on = r".*\.lora_A\.weight"
    whole_factors = True
    linear_steps = True
    starts = "stack"

    def initialise(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the adapter with the rows of A outside of what earlier tasks use.

        Raises:
            clients.input_spaces.NoFreeDirection: if a layer has fewer free directions than ranks.
        """
        moved = {}
        for layer in input_spaces.layers_of(adapter):
            rows = adapter[layer + A]
            free = len(input_spaces.free_directions(layer, rows.shape[1], memory))
            input_spaces.refuse_full(layer, rows.shape[1], free, len(rows))
            moved[layer + A] = input_spaces.outside(layer, rows, memory)
        return {**adapter, **moved}

    def project(self, grads: Tensors, memory: Tensors) -> Tensors:
        """Return the gradients with A's rows outside of what earlier tasks use."""
        moved = {
            layer + A: input_spaces.outside(layer, grads[layer + A], memory)
            for layer in input_spaces.layers_of(grads)
        }
        return {**grads, **moved}

    def consolidate_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return the second moments of what enters every layer."""
        return input_spaces.summed(reading.inputs())

    def parts(
        self, when: When, params: Tensors, returned: Collection[str]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the second moments, ``[in, in]`` a layer."""
        return input_spaces.shapes(params) if when == "consolidate" else {}

    def combine(
        self, when: When, params: Tensors, memory: Tensors, updates: Iterable[Update]
    ) -> Tensors:
        """Return the memory with the directions that all clients' data of the task use."""
        if when == "prepare":
            return memory
        return remembered(memory, updates, self.threshold, self.growth)


def remembered(
    memory: Tensors, updates: Iterable[Update], threshold: float, growth: float
) -> dict[str, Tensor]:
    """Return the memory after a task; ``tasks`` counts them.

    Args:
        memory: before.
        updates: second moments of every layer.
        threshold: the share of the first task's squared inputs to hold.
        growth: what it grows by with each task; 1 is the most.
    """
    done = int(memory.get(_TASKS, 0))
    energy = min(1.0, threshold + growth * done)
    found: dict[str, Tensor] = {_TASKS: torch.tensor(done + 1)}
    for layer, moments in input_spaces.total(updates).items():
        found |= input_spaces.with_task(layer, moments, energy, memory)
    return found
