"""Directions of earlier tasks beside a trained pair: SD-LoRA's tensors, arXiv 2501.13198.

A layer changes by ``scaling * (sum a_i B_i A_i + a_t B_t A_t)``: ``NAME.past_A.weight`` and
``NAME.past_B.weight`` are the pairs of earlier tasks stacked, all of one rank, ``lora_A`` and
``lora_B`` the newest, and ``NAME.lora_magnitudes`` ``[tasks]`` all the ``a``, the newest last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import MAGNITUDES, NotLowRank
from strategies.uplink import derived

_A, _B = ".lora_A.weight", ".lora_B.weight"
PAST_A, PAST_B = ".past_A.weight", ".past_B.weight"


def directed_layers(tensors: Tensors) -> list[str]:
    """Return the names of an adapter's layers, sorted.

    Raises:
        NotLowRank: if there is none, or one has no magnitudes.
    """
    layers = sorted(n.removesuffix(_A) for n in tensors if n.endswith(_A))
    for layer in layers:
        if layer + MAGNITUDES not in tensors:
            raise NotLowRank(
                f"layer {layer!r} has no magnitudes ({layer + MAGNITUDES}); use adapter sd-lora"
            )
    if not layers:
        raise NotLowRank("the adapter has no low-rank layer; use adapter sd-lora")
    return layers


def summed(tensors: Tensors) -> dict[str, Tensor]:
    """Return the same change as plain factors: pairs stacked, the newest first, magnitudes in B.

    Tensors that are no part of such a layer stay as they are.
    """
    found = {n: t for n, t in tensors.items() if not n.endswith((MAGNITUDES, PAST_A, PAST_B))}
    for layer in (n.removesuffix(MAGNITUDES) for n in tensors if n.endswith(MAGNITUDES)):
        magnitudes = tensors[layer + MAGNITUDES]
        b = tensors[layer + _B] * magnitudes[-1]
        if layer + PAST_A in tensors:
            past = tensors[layer + PAST_A]
            each = magnitudes[:-1].repeat_interleave(len(past) // (len(magnitudes) - 1))
            found[layer + _A] = torch.cat([tensors[layer + _A], past])
            b = torch.cat([b, tensors[layer + PAST_B] * each], dim=1)
        found[layer + _B] = b
    return found


def with_task(tensors: Tensors, seed: int) -> dict[str, Tensor]:
    """Return an adapter whose newest pairs are directions, with a new pair at zero above them.

    The product is unchanged: the pair's factors are divided by their norms, and its magnitude is
    multiplied by them. A layer whose newest B is zero has learned nothing, and where that is so in
    all, the adapter is returned as it is.

    Args:
        tensors: the adapter.
        seed: of the new A's, which are Kaiming-uniform, as PEFT draws them.
    """
    layers = directed_layers(tensors)
    found = dict(tensors)
    if not any(tensors[layer + _B].any() for layer in layers):
        return found
    for layer in layers:
        a, b = tensors[layer + _A], tensors[layer + _B]
        norms = a.double().norm(), b.double().norm()
        # a zero B has no direction, and keeps its place so that all tasks have one
        sizes = [one if one > 0 else torch.ones_like(one) for one in norms]
        unit_a, unit_b = ((t.double() / n).to(t.dtype) for t, n in zip((a, b), sizes, strict=True))
        past = [tensors[layer + part] for part in (PAST_A, PAST_B) if layer + part in tensors]
        found[layer + PAST_A] = torch.cat([*past[:1], unit_a])
        found[layer + PAST_B] = torch.cat([*past[1:], unit_b], dim=1)
        magnitudes = tensors[layer + MAGNITUDES].double().clone()
        magnitudes[-1] *= sizes[0] * sizes[1]
        grown = torch.cat([magnitudes, magnitudes.new_ones(1)])
        found[layer + MAGNITUDES] = grown.to(tensors[layer + MAGNITUDES].dtype)
        generator = torch.Generator().manual_seed(derived(seed, f"sd-lora/{layer}"))
        drawn = torch.rand(a.shape, generator=generator, dtype=torch.float64) * 2 - 1
        found[layer + _A] = (drawn / math.sqrt(a.shape[1])).to(a.dtype)
        found[layer + _B] = torch.zeros_like(b)
    return found
