"""The tensors of PEFT's LoRA layers, by weft's names: found, checked and written.

A layer's tensors are named as in PEFT's files, without their prefix and the adapter's name. What a
layer holds is asked of the layer, so that a method is known by its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clients.base_factors import Factors
from strategies.base import Tensors

A, B, DIAGONAL, SCALING = ".lora_A.weight", ".lora_B.weight", ".lora_diag", ".scaling"
CORE, MAGNITUDES = ".lora_core.weight", ".lora_magnitudes"
_RANK_AXES = {
    A: (0,),
    ".lora_A.blocks": (0,),
    B: (1,),
    ".lora_B.blocks": (1,),
    DIAGONAL: (0,),
    CORE: (0, 1),
    ".lora_monteclora_sampler.std_prior": (0,),
}


class AdapterMismatch(ValueError):
    """Tensors do not belong to this adapter on this base model."""


def without_head(tensors: Tensors) -> dict[str, Tensor]:
    """Return ``tensors`` without those of a task's head."""
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
    return {
        name + part: getattr(holder, attribute)
        for name, layer in adapted(model, adapter).items()
        for part, (holder, attribute) in _holders(layer, adapter).items()
    }


def write(model: nn.Module, adapter: str, tensors: Tensors) -> None:
    """Put ``tensors`` into ``adapter``; ranks and scalings become theirs, a head is ignored.

    Raises:
        AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer; nothing is
            written then.
    """
    layers, given = adapted(model, adapter), without_head(tensors)
    for problem in _mismatches(layers, adapter, given):
        raise AdapterMismatch(problem)
    for name, layer in layers.items():
        _set_rank(layer, adapter, _rank(name, layer, adapter, given))
        layer.scaling[adapter] = float(given[name + SCALING])
    with torch.no_grad():
        for name, parameter in parameters(model, adapter).items():
            parameter.copy_(given[name])


def _holders(layer: Any, adapter: str) -> dict[str, tuple[nn.Module, str]]:
    """Return which module keeps each parameter of a layer, and under which name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for side in ("lora_A", "lora_B"):
        factor = getattr(layer, side)[adapter]
        found[f".{side}.{'blocks' if _num_blocks(factor) > 1 else 'weight'}"] = factor, "weight"
    if adapter in layer.lora_magnitude_vector:
        found[".lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter], "weight"
    if adapter in getattr(layer, "lora_diag", {}):
        found[DIAGONAL] = layer.lora_diag, adapter
    if adapter in getattr(layer, "lora_core", {}):
        found[CORE] = layer.lora_core[adapter], "weight"
    if adapter in getattr(layer, "lora_magnitudes", {}):
        found[MAGNITUDES] = layer.lora_magnitudes, adapter
    samplers = getattr(layer, "lora_monteclora_sampler", {})
    if adapter in samplers:
        for name, _ in samplers[adapter].named_parameters(recurse=False):
            found[f".lora_monteclora_sampler.{name}"] = samplers[adapter], name
    return found


def _num_blocks(factor: nn.Module) -> int:
    """Return into how many blocks on its diagonal a factor falls; 1 for a full one."""
    return int(getattr(factor, "nblocks", 1))


def _shape(part: str, shape: Sequence[int], old_rank: int, rank: int) -> list[int]:
    """Return the shape of a part at another rank."""
    axes = _RANK_AXES.get(part, ())
    return [n * rank // old_rank if i in axes else n for i, n in enumerate(shape)]


def _rank(name: str, layer: Any, adapter: str, given: Tensors) -> int:
    """Return the rank that the given tensors have at a layer, 0 where they have none."""
    factor = next(part for part in _holders(layer, adapter) if part.startswith(".lora_A."))
    return given[name + factor].shape[0] if given[name + factor].ndim else 0


def _set_rank(layer: Any, adapter: str, rank: int) -> None:
    """Give a layer's parameters another rank, with values yet to be written."""
    old_rank = layer.r[adapter]
    if rank == old_rank:
        return
    for part, (holder, attribute) in _holders(layer, adapter).items():
        old = getattr(holder, attribute)
        if part in _RANK_AXES:
            # A new object: autograd remembers the shape that the old one had in past graphs.
            empty = old.new_empty(_shape(part, old.shape, old_rank, rank))
            setattr(holder, attribute, nn.Parameter(empty, requires_grad=old.requires_grad))
    layer.r[adapter] = rank
    layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = rank


def _mismatches(layers: Mapping[str, Any], adapter: str, given: Tensors) -> Iterator[str]:
    """Yield a sentence for everything that keeps ``given`` from fitting these layers."""
    holders = {name: _holders(layer, adapter) for name, layer in layers.items()}
    expected = {name + part for name, parts in holders.items() for part in (*parts, SCALING)}
    for name in sorted(expected - set(given)):
        yield f"the adapter has no tensor {name}, which target_modules asks for"
    for name in sorted(set(given) - expected):
        yield (
            f"the adapter has the tensor {name}, for which this model has no place; set "
            "target_modules and the method as they were when it was trained"
        )
    for name, layer in layers.items():
        rank = _rank(name, layer, adapter, given)
        blocks = max(_num_blocks(f[adapter]) for f in (layer.lora_A, layer.lora_B))
        if rank % blocks:
            yield f"{name} has rank {rank}, which does not fall into {blocks} blocks"
        shapes = {
            part: _shape(part, getattr(*held).shape, layer.r[adapter], rank)
            for part, held in holders[name].items()
        }
        for part, shape in sorted({**shapes, SCALING: []}.items()):
            key = name + part
            if list(given[key].shape) != shape or rank < 1:
                yield f"{key} must be {shape}, got {list(given[key].shape)}"
