"""The tensors of PEFT's LoRA layers, by weft's names: found, checked and written.

A layer's tensors are named as in PEFT's files, without their prefix and the adapter's name. What a
layer holds is asked of the layer, so that a method is known by its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import Tensors

SCALING = ".scaling"
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class AdapterMismatch(ValueError):
    """Tensors do not belong to this adapter on this base model."""


def without_head(tensors: Tensors) -> dict[str, Tensor]:
    """Return ``tensors`` without those of a task's head."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def adapted(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """Return the layers that hold ``adapter`` (or any), by the base model's names."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A)
    }


def parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the live parameters of ``adapter`` by name, layer after layer."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted(model, adapter).items():
        found[name + _A] = layer.lora_A[adapter].weight
        found[name + _B] = layer.lora_B[adapter].weight
        if adapter in layer.lora_magnitude_vector:
            found[name + _MAGNITUDE] = layer.lora_magnitude_vector[adapter].weight
    return found


def write(model: nn.Module, adapter: str, tensors: Tensors) -> None:
    """Put ``tensors`` into ``adapter``; ranks and scalings become theirs, a head is ignored.

    Raises:
        AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer; nothing is
            written then.
    """
    layers, given = adapted(model, adapter), without_head(tensors)
    for problem in _mismatches(layers, parameters(model, adapter), given):
        raise AdapterMismatch(problem)
    for name, layer in layers.items():
        rank = given[name + _A].shape[0]
        if rank != layer.lora_A[adapter].out_features:
            _set_rank(layer, adapter, rank)
        layer.scaling[adapter] = float(given[name + SCALING])
    with torch.no_grad():
        for name, parameter in parameters(model, adapter).items():
            parameter.copy_(given[name])


def _set_rank(layer: Any, adapter: str, rank: int) -> None:
    """Give a layer's factors another rank, with values yet to be written."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    layer.r[adapter] = down.out_features = up.in_features = rank
    for factor, shape in ((down, (rank, layer.in_features)), (up, (layer.out_features, rank))):
        old = factor.weight
        # A new object: autograd remembers the shape that the old one had in past graphs.
        factor.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)


def _mismatches(
    layers: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], given: Tensors
) -> Iterator[str]:
    """Yield a sentence for everything that keeps ``given`` from fitting these layers."""
    expected = set(parameters) | {name + SCALING for name in layers}
    for name in sorted(expected - set(given)):
        yield f"the adapter has no tensor {name}, which target_modules asks for"
    for name in sorted(set(given) - expected):
        yield (
            f"the adapter has the tensor {name}, for which this model has no place; set "
            "target_modules and the method as they were when it was trained"
        )
    for name, layer in layers.items():
        rank = given[name + _A].shape[0] if given[name + _A].ndim else 0
        shapes: dict[str, tuple[int, ...]] = {
            name + _A: (rank, layer.in_features),
            name + _B: (layer.out_features, rank),
            name + _MAGNITUDE: (layer.out_features,),
            name + SCALING: (),
        }
        for key in sorted(shapes.keys() & given.keys()):
            if tuple(given[key].shape) != shapes[key] or rank < 1:
                yield f"{key} must be {list(shapes[key])}, got {list(given[key].shape)}"
