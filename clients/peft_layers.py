"""An adapter's layers by PEFT's files and config, as weft's: names, ranks, scalings, options."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clients import models, placement, shifts
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from clients.export import CONFIG, PEFT_PREFIX

_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector)")


class NotImportable(ValueError):
    """This folder holds no adapter that weft takes."""


class Foreign(Exception):
    """Why an adapter stays as PEFT wrote it."""


def is_factor(name: str) -> bool:
    """Return whether a tensor of PEFT's files is a part of an adapted linear layer."""
    return _PART.fullmatch(name.removeprefix(PEFT_PREFIX)) is not None


def layers_of(
    tensors: Mapping[str, Tensor], linear: Mapping[str, Any], prefix: str
) -> dict[str, dict[str, Tensor]]:
    """Return each layer's tensors by part, layers sorted by weft's names.

    Args:
        tensors: factors of linear layers, see :func:`is_factor`.
        linear: the base model's linear layers.
        prefix: what a classifier's names have before its body's.

    Raises:
        NotImportable: if a layer is not in the base model, not complete, or of another shape.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name.removeprefix(PEFT_PREFIX))
        if found is None:
            raise NotImportable(f"{name} is no factor of a linear layer")
        layer = found["layer"]
        if layer not in linear:  # a classifier's body lies deeper than the body alone
            layer = layer.removeprefix(f"{prefix}.")
        if layer not in linear:
            raise NotImportable(
                f"the base model has no linear layer {found['layer']}; the adapter is another's: "
                "give its own with --base"
            )
        layers.setdefault(layer, {})[found["part"]] = tensor
    for layer, parts in layers.items():
        if lacking := {"lora_A.weight", "lora_B.weight"} - parts.keys():
            raise NotImportable(f"{layer} lacks its {' and '.join(sorted(lacking))}")
        _name_blocks(layer, parts, placement.shape(linear[layer]))
    return dict(sorted(layers.items()))


def changes_of(
    tensors: Mapping[str, Tensor],
    adapted: Collection[str],
    config: Mapping[str, Any],
    spec: ModelSpec,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return parameters that were trained whole, as changes of the base's, and the options of it.

    Args:
        tensors: by PEFT's names, without factors.
        adapted: the layers that have factors.
        config: PEFT's.
        spec: the base model, whose weights are read if there are such parameters.

    Raises:
        Foreign: if one is no parameter of the base model, or weft does not train it.
        clients.models.ModelNotFound: if the base model is not here.
    """
    bias = config.get("bias", "none")
    if not tensors and bias == "none":
        return {}, {}
    backbone = models.load(replace(spec, labels=())).backbone
    base, changes = dict(backbone.named_parameters()), {}
    for name, tensor in tensors.items():
        own = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        own = own if own in base else own.removeprefix(f"{backbone.base_model_prefix}.")
        if own not in base or base[own].shape != tensor.shape:
            raise Foreign(f"it holds {name}, which is no factor and no parameter of the base model")
        layer, _, part = own.rpartition(".")
        changes[layer + shifts.SHIFT + part] = tensor.float() - base[own].detach().float().cpu()
    layers = dict.fromkeys(name.partition(shifts.SHIFT)[0] for name in changes)
    whole = [re.escape(layer) for layer in layers if _is_whole(backbone, layer, changes)]
    try:
        places = shifts.places(backbone, adapted, bias, whole)
    except ValueError as error:
        raise Foreign(str(error)) from None
    found = {p.layer + shifts.SHIFT + p.part: getattr(p.module, p.part) for p in places}
    if unexpected := sorted(changes.keys() - found.keys()):
        raise Foreign(f"it holds {unexpected[0]}, which its bias ({bias}) does not ask for")
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in found.items()}
    return {**zeros, **changes}, {"bias": bias, "modules_to_save": whole}


def _is_whole(backbone: nn.Module, layer: str, changes: Mapping[str, Tensor]) -> bool:
    own = backbone.get_submodule(layer).named_parameters(recurse=False)
    parts = [part for part, _ in own]
    return parts != ["bias"] and all(layer + shifts.SHIFT + part in changes for part in parts)


def _name_blocks(layer: str, parts: dict[str, Tensor], shape: tuple[int, int]) -> None:
    """Give block-diagonal factors the name that weft has for them, and check every shape."""
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    for side, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise NotImportable(f"{layer}.{side} must be a matrix of floating point, got {got}")
    rank, (out_features, in_features) = a.shape[0], shape
    whole_a, whole_b = a.shape[1] == in_features, b.shape[1] == rank
    blocks_fit = (whole_a or (whole_b and in_features % max(a.shape[1], 1) == 0)) and (
        whole_b or rank % max(b.shape[1], 1) == 0
    )
    if b.shape[0] != out_features or not blocks_fit or rank < 1:
        raise NotImportable(
            f"{layer}: factors [{rank}, {in_features}] and [{out_features}, {rank}] fit the base "
            f"model, got {list(a.shape)} and {list(b.shape)}; give its own base with --base"
        )
    for factor, whole in (("lora_A", whole_a), ("lora_B", whole_b)):
        if not whole:
            parts[f"{factor}.blocks"] = parts.pop(f"{factor}.weight")
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != (out_features,):
        size = list(magnitude.shape)
        raise NotImportable(f"{layer}.lora_magnitude_vector must be [{out_features}], got {size}")


def sizes(
    layers: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return each layer's rank and alpha, by PEFT's patterns.

    Raises:
        NotImportable: if the config says another rank than the tensors have, or no number.
    """
    ranks, alphas = {}, {}
    for layer, parts in layers.items():
        a = parts["lora_A.blocks" if "lora_A.blocks" in parts else "lora_A.weight"]
        rank = _by_pattern(config, "rank_pattern", "r", layer)
        if rank != a.shape[0]:
            raise NotImportable(
                f"{CONFIG} gives {layer} the rank {rank}, and its tensors have {a.shape[0]}"
            )
        ranks[layer] = a.shape[0]
        alphas[layer] = _by_pattern(config, "alpha_pattern", "lora_alpha", layer)
    return ranks, alphas


def _by_pattern(config: Mapping[str, Any], patterns: str, default: str, layer: str) -> float:
    from peft.utils.other import get_pattern_key

    given = config.get(patterns) or {}
    try:
        found = given.get(get_pattern_key(given.keys(), layer), config.get(default))
    except (re.error, AttributeError, TypeError) as error:
        raise NotImportable(f"{CONFIG}: {patterns} cannot be read ({error})") from None
    if isinstance(found, (int, float)) and math.isfinite(found) and found > 0:
        return found
    raise NotImportable(f"{CONFIG}: {default} must be a number > 0, got {found!r} for {layer}")


def choice_of(
    config: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Tensor]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    more: Mapping[str, Any],
) -> PluginChoice:
    """Return the method with the options that training would have given it; ``more`` of them.

    Raises:
        NotImportable: if they go together in no method.
    """
    rank, alpha = (Counter(sizes.values()).most_common(1)[0][0] for sizes in (ranks, alphas))
    options: dict[str, Any] = {
        "r": rank,
        "alpha": alpha,
        "target_modules": [re.escape(layer) for layer in layers],
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        **more,
    }
    side_a = [n for n, parts in layers.items() if "lora_A.blocks" in parts]
    name = "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_dora"):
        name = "dora"
    elif tokens := config.get("alora_invocation_tokens"):
        name, options["invocation"] = "alora", tokens
    elif side_a or any("lora_B.blocks" in parts for parts in layers.values()):
        blocks = (config.get("use_bdlora") or {}).get("nblocks")
        name, options["nblocks"] = "bdlora", blocks
        options["block_a"] = [re.escape(n) for n in side_a]
    magnitudes = sum("lora_magnitude_vector" in parts for parts in layers.values())
    if magnitudes != (len(layers) if name == "dora" else 0):
        raise NotImportable(
            f"{CONFIG} says {name}, and {magnitudes} of {len(layers)} layers have a magnitude"
        )
    try:
        return PluginChoice(name, ADAPTERS.get(name).check(options))
    except ValueError as error:
        raise NotImportable(f"{CONFIG} is not one of {name}: {error}") from error
