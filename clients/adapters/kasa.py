"""KaSA: LoRA with a trained diagonal between B and A, over a base without its smallest components.

Source: Knowledge-aware singular-value adaptation, arXiv 2412.06071. PEFT truncates the base weight;
here the ``r`` smallest singular components of each weight are taken away by a frozen offset
underneath, so that the base model stays whole. KaSA's two penalties are the regularizer ``kasa``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients import lora_layers
from clients.adapters.peft import TRAINED, Method, PeftLora, plugin
from clients.base_factors import minor_components
from clients.initialisations import InitInputs
from clients.lora_layers import DIAGONAL, B
from strategies.base import Tensors
from strategies.plugins import Plugin

KASA = Method(
    "kasa",
    "LoRA with a diagonal between B and A, over a base without its smallest components.",
    "2412.06071",
    {},
    frozenset({"low-rank", "merge", "dp-vmap", "offset", "zero-b"}),
)


@dataclass(frozen=True, slots=True)
class Kasa(PeftLora):
    """LoRA with a diagonal: ``NAME.lora_diag`` ``[rank]`` beside every layer's factors."""

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place); see :class:`PeftLora`."""
        from peft.tuners.lora.variants import KasaLinearVariant

        model = PeftLora.attach(self, backbone, underlay)
        for layer in lora_layers.adapted(model, TRAINED).values():
            # PEFT's own set-up would truncate the base weight
            down = layer.lora_A[TRAINED].weight
            layer.lora_variant[TRAINED] = KasaLinearVariant()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_diag")
            diagonal = torch.randn(len(down), device=down.device, dtype=down.dtype)
            layer.lora_diag = nn.ParameterDict({TRAINED: nn.Parameter(diagonal)})
        return model

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Return the offset that takes the smallest components out of every base weight."""
        layers = lora_layers.adapted(model, TRAINED)
        return lora_layers.offset_tensors(
            {name: minor_components(layer, TRAINED) for name, layer in layers.items()}
        )

    def factored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the same delta as plain factors: the diagonal goes into B."""
        found = {n: t for n, t in tensors.items() if not n.endswith(DIAGONAL)}
        for name in tensors.keys() - found.keys():
            up = name.removesuffix(DIAGONAL) + B
            found[up] = tensors[up] * tensors[name]
        return found


def plugins() -> Iterator[Plugin]:
    """Yield KaSA."""
    yield plugin(KASA, Kasa)
