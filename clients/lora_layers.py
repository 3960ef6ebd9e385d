"""PEFT's LoRA layers inside a model: their tensors by weft's names, read, written and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clients.base_factors import Factors
from strategies.base import Tensors

A, B, MAGNITUDE, DIAGONAL, SCALING = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
    ".lora_diag",
    ".scaling",
)


class AdapterMismatch(ValueError):
    """Tensors do not belong to this adapter on this base model."""


def without_head(tensors: Tensors) -> dict[str, Tensor]:
    """Return ``tensors`` without the task head's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def factor_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return factors by layer as an adapter's tensors, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, one in factors.items():
        found[name + A], found[name + B] = one.a.to("cpu"), one.b.to("cpu")
        found[name + SCALING] = torch.tensor(one.scaling, dtype=torch.float32)
    return found


def offset_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the tensors of an adapter that takes the product of ``factors`` away."""
    return factor_tensors({name: one._replace(b=-one.b) for name, one in factors.items()})


def add_diagonal(layer: Any, adapter: str) -> None:
    """Make a layer KaSA's, but for the truncation of its base weight, which the underlay holds."""
    from peft.tuners.lora.variants import KasaLinearVariant

    down = layer.lora_A[adapter].weight
    layer.lora_variant[adapter] = KasaLinearVariant()
    layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_diag")
    diagonal = torch.randn(len(down), device=down.device, dtype=down.dtype)
    layer.lora_diag = nn.ParameterDict({adapter: nn.Parameter(diagonal)})


def adapted(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """Return the layers that hold ``adapter`` (or any), by the base model's names."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A)
    }


def live_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of ``adapter``, by weft's names."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted(model, adapter).items():
        found[name + A] = layer.lora_A[adapter].weight
        found[name + B] = layer.lora_B[adapter].weight
        if adapter in layer.lora_magnitude_vector:
            found[name + MAGNITUDE] = layer.lora_magnitude_vector[adapter].weight
        if adapter in getattr(layer, "lora_diag", ()):
            found[name + DIAGONAL] = layer.lora_diag[adapter]
    return found


def write_tensors(model: nn.Module, adapter: str, tensors: Tensors) -> None:
    """Put ``tensors`` into ``adapter``, at the ranks and scalings that they have.

    Raises:
        AdapterMismatch: if one is missing, unexpected or of a wrong shape; nothing is written then.
    """
    layers, given = adapted(model, adapter), without_head(tensors)
    for problem in _mismatches(layers, live_parameters(model, adapter), given):
        raise AdapterMismatch(problem)
    for name, layer in layers.items():
        rank = given[name + A].shape[0]
        if rank != layer.lora_A[adapter].out_features:
            _set_rank(layer, adapter, rank)
        layer.scaling[adapter] = float(given[name + SCALING])
    with torch.no_grad():
        for name, parameter in live_parameters(model, adapter).items():
            parameter.copy_(given[name])


def _set_rank(layer: Any, adapter: str, rank: int) -> None:
    """Give a layer's factors another rank, with values yet to be written."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    layer.r[adapter] = down.out_features = up.in_features = rank
    for factor, shape in ((down, (rank, layer.in_features)), (up, (layer.out_features, rank))):
        old = factor.weight
        # A new object: autograd remembers the shape that the old one had in past graphs.
        factor.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
    if adapter in getattr(layer, "lora_diag", ()):
        old = layer.lora_diag[adapter]
        layer.lora_diag[adapter] = nn.Parameter(old.new_empty(rank), old.requires_grad)


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
        rank = given[name + A].shape[0] if given[name + A].ndim else 0
        shapes: dict[str, tuple[int, ...]] = {
            name + A: (rank, layer.in_features),
            name + B: (layer.out_features, rank),
            name + MAGNITUDE: (layer.out_features,),
            name + DIAGONAL: (rank,),
            name + SCALING: (),
        }
        for key in sorted(shapes.keys() & given.keys()):
            if tuple(given[key].shape) != shapes[key] or rank < 1:
                yield f"{key} must be {list(shapes[key])}, got {list(given[key].shape)}"
