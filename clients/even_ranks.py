"""Plain LoRA of one rank and scaling 1, for engines that read one rank and alpha for all layers.

vLLM is one: it takes ``r`` and ``lora_alpha`` of PEFT's config for every layer, and passes over
``rank_pattern`` and ``alpha_pattern`` without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, lora_layers, lora_tensors

_PLAIN = (".lora_A.weight", ".lora_B.weight", ".scaling")


class NotPlain(ValueError):
    """An adapter is more than plain factors."""


def evened(adapter: Tensors) -> dict[str, Tensor]:
    """Return the same adapter with every layer of the largest rank, and of scaling 1.

    The products are unchanged: what is added to the factors is zero, and the scaling goes into B.

    Args:
        adapter: plain factors, of any ranks and scalings, without a head.

    Raises:
        NotPlain: if there is a tensor that is none of them.
    """
    if other := sorted(name for name in adapter if not name.endswith(_PLAIN)):
        raise NotPlain(f"it has {other[0]}, which is no factor of plain LoRA")
    layers = lora_layers(adapter)
    rank = max(factors.a.shape[0] for factors in layers.values())
    return lora_tensors({name: _padded(factors, rank) for name, factors in layers.items()})


def _padded(factors: Factors, rank: int) -> Factors:
    lacking = rank - factors.a.shape[0]
    pad = torch.nn.functional.pad
    b = (factors.b.float() * factors.scaling.float()).to(factors.b.dtype)
    return Factors(pad(factors.a, (0, 0, 0, lacking)), pad(b, (0, lacking)), torch.tensor(1.0))
