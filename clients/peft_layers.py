"""An adapter's layers by PEFT's files and config, as weft's: names, ranks, scalings, options."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clients import placement
from clients.adapters import ADAPTERS
from clients.assignment import PluginChoice
from clients.export import CONFIG, PEFT_PREFIX

_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector)")


class NotImportable(ValueError):
    """This folder holds no adapter that weft takes."""


class Foreign(Exception):
    """Why an adapter stays as PEFT wrote it."""


def layers_of(
    tensors: Mapping[str, Tensor], linear: Mapping[str, Any], prefix: str
) -> dict[str, dict[str, Tensor]]:
    """Return each layer's tensors by part, layers sorted by weft's names.

    Raises:
        Foreign: if something else than linear layers is adapted, or trained whole.
        NotImportable: if a layer is not in the base model, not complete, or of another shape.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name.removeprefix(PEFT_PREFIX))
        if found is None:
            raise Foreign(f"it holds {name}, which is no factor of a linear layer")
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
) -> PluginChoice:
    """Return the method with the options that training would have given it.

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
