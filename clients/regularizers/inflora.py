"""InfLoRA (2404.00228): A is made from a task's inputs, outside of what earlier tasks use.

Before round 1 clients send the second moments of what enters each layer; the rows of A are the
directions of them that earlier tasks leave free and the new one uses most, and stay frozen: B alone
is trained, which averages exactly. So ``B A x`` is nearly zero for the inputs of earlier tasks,
whatever the optimizer. After the task its inputs are remembered as GPM does (``DualGPM``).

Rows have the norm ``1 / sqrt 3`` of PEFT's drawn ones, as in liangyanshuo/InfLoRA, the official
code. There the moments are projected from one side; here from both, which gives the principal
directions of the projected inputs, as the paper has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from clients import input_spaces
from clients.input_spaces import A
from clients.regularizers import Regularizer, When
from clients.regularizers.gpm import remembered
from strategies.base import Tensors, Update
from strategies.plugins import Range

if TYPE_CHECKING:  # it imports the regularizers
    from clients.reading import Reading

_DESIGN = ".design"


@dataclass(frozen=True)
class InfLoRA(Regularizer):
    """A frozen A that reacts to the new task's inputs, and not to those of earlier ones.

    Attributes:
        threshold: share of a task's squared inputs that the remembered directions must hold, in
            (0, 1].
        growth: by how much the share is larger for each further task, >= 0, up to 1. The paper's
            threshold reaches 1 with the last task.
    """

    threshold: Annotated[float, Range(0, 1, open_low=True)] = 0.95
    growth: Annotated[float, Range(0, 1)] = 0.005

    acts_on = r".*\.lora_B\.weight"
    freezes = r".*\.lora_A\..*"
    starts = "stack"

    def prepare_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return the second moments of what enters every layer, before the task is learned."""
        return input_spaces.summed(reading.inputs())

    def consolidate_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return the second moments of what enters every layer, when the task is learned."""
        return input_spaces.summed(reading.inputs())

    def parts(
        self, when: When, params: Tensors, returned: Collection[str]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the second moments, ``[in, in]`` a layer."""
        return input_spaces.shapes(params)

    def combine(
        self, when: When, params: Tensors, memory: Tensors, updates: Iterable[Update]
    ) -> Tensors:
        """Return the memory with the designed rows, or after the task without them.

        Raises:
            clients.input_spaces.NoFreeDirection: if a layer has fewer free directions than ranks.
        """
        if when == "consolidate":
            return remembered(memory, updates, self.threshold, self.growth)
        designs = {}
        for layer, moments in input_spaces.total(updates).items():
            rank = len(params[layer + A])
            rows = input_spaces.leading_free(layer, moments, rank, memory) / math.sqrt(3)
            designs[layer + _DESIGN] = rows.float()
        return {**memory, **designs}

    def initialise(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the adapter with the designed rows as A; as it is before there are any."""
        designed: dict[str, Tensor] = {
            layer + A: memory[layer + _DESIGN].to(adapter[layer + A].dtype)
            for layer in input_spaces.layers_of(adapter)
            if layer + _DESIGN in memory
        }
        return {**adapter, **designed}
