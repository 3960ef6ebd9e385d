"""MiCA: A is trained in the directions that the base weight uses least; B is frozen.

Source: Minor Component Adaptation, arXiv 2604.01694. ``B`` holds the left singular vectors of a
base weight that belong to its ``r`` smallest singular values, ``A`` starts at zero.

PEFT decomposes every layer whenever it makes one, and rounds ``B`` to the base model's precision,
in which its columns are no longer orthonormal. Here the decomposition is done once, before round 1,
from the weight as it acts (also where it is quantised), and kept in float32; in every later
attachment ``B`` is what the version says. In all else the method is LoRA with ``B`` frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients import lora_layers
from clients.adapters.peft import LOW_RANK, TRAINED, Method, PeftLora, plugin
from clients.base_factors import layer_weight
from clients.initialisations import InitInputs
from strategies.plugins import Plugin

MICA = Method(
    "mica",
    "LoRA whose B is the base weight's minor left singular vectors and never trains.",
    "2604.01694",
    {},
    LOW_RANK,
)


@dataclass(frozen=True, slots=True)
class MiCA(PeftLora):
    """LoRA with a frozen B of minor components.

    Clients share B, so that the mean of their products is the product of their mean: averaging A
    is exact.
    """

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train: every B."""
        return r".*\.lora_B\.weight"

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Set B to the minor left singular vectors of each base weight, and A to zero.

        Costs an SVD of every adapted weight: O(out in min(out, in)), in float32.
        """
        for layer in lora_layers.adapted(model, TRAINED).values():
            left = torch.linalg.svd(layer_weight(layer, TRAINED), full_matrices=False).U
            down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
            with torch.no_grad():
                up.copy_(left[:, -up.shape[1] :])  # singular values descend
                down.zero_()
        return {}


def plugins() -> Iterator[Plugin]:
    """Yield MiCA."""
    yield plugin(MICA, MiCA)
