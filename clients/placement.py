"""Which linear layers of a base model an adapter sits on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from strategies.plugins import BadOptions

T = TypeVar("T")


def linear_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by its full name, in the model's order.

    Quantised layers and GPT-2's transposed ``Conv1D`` are linear layers too.
    """
    return {name: module for name, module in backbone.named_modules() if is_linear(module)}


def is_linear(module: object) -> bool:
    """Return whether a module is a linear layer; see :func:`linear_layers`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def targets(
    backbone: nn.Module,
    wanted: str | Sequence[str],
    layers: Sequence[int] | None,
    excluded: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """Return the layers that ``target_modules``, ``layers`` and ``exclude_modules`` mean.

    Args:
        backbone: the base model.
        wanted: ``auto`` (PEFT's choice for the architecture), ``all-linear`` (all but the output
            embedding), or module names: regular expressions of the last parts of their paths, as
            PEFT reads its patterns.
        layers: indices among the model's repeated layers, or None for all.
        excluded: names, as in ``wanted``, of layers to leave out.

    Raises:
        BadOptions: if a name or an index exists nowhere, ``auto`` has nothing to go by, or no layer
            is left.
    """
    linear = linear_layers(backbone)
    if wanted == "all-linear":
        output = getattr(backbone, "get_output_embeddings", lambda: None)()
        chosen = [name for name, module in linear.items() if module is not output]
    else:
        patterns = _default_targets(backbone, linear) if wanted == "auto" else wanted
        chosen = _named([patterns] if isinstance(patterns, str) else patterns, linear)
    if layers is not None:
        chosen = _in_layers(chosen, layers)
    left_out = by_pattern("exclude_modules", dict.fromkeys(excluded, True), chosen, False)
    if chosen and all(left_out.values()):
        raise BadOptions(
            f"exclude_modules leaves no layer to adapt (there were: {', '.join(endings(chosen))})"
        )
    return {name: linear[name] for name in chosen if not left_out[name]}


def by_pattern(
    option: str, patterns: Mapping[str, T], names: Iterable[str], default: T
) -> dict[str, T]:
    """Return each layer's value: that of the first pattern that names it, or ``default``.

    Raises:
        BadOptions: if a pattern names none of the layers.
    """
    values = dict.fromkeys(names, default)
    for pattern, value in reversed(list(patterns.items())):
        found = [name for name in values if matches(pattern, name)]
        if not found:
            raise BadOptions(
                f"{option}: no adapted layer is called {pattern!r} "
                f"(adapted layers: {', '.join(endings(values))})"
            )
        values.update(dict.fromkeys(found, value))
    return values


def check_ranks(ranks: Mapping[str, int], layers: Mapping[str, nn.Module]) -> None:
    """Check that no layer gets a rank above its smaller side.

    Raises:
        BadOptions: naming the first layer that does.
    """
    for name, rank in ranks.items():
        out_features, in_features = shape(layers[name])
        largest = min(out_features, in_features)
        if not 1 <= rank <= largest:
            raise BadOptions(
                f"rank must be between 1 and {largest} ({name} is "
                f"[{out_features}, {in_features}]), got {rank}"
            )


def transposed(layers: Mapping[str, nn.Module]) -> bool:
    """Return whether these layers keep their weights as ``[in, out]``, as GPT-2's do."""
    return not any(isinstance(module, nn.Linear) for module in layers.values())


def _default_targets(backbone: nn.Module, linear: Iterable[str]) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    architecture = getattr(getattr(backbone, "config", None), "model_type", None)
    if architecture not in KNOWN:
        raise BadOptions(
            f"target_modules 'auto' knows nothing about the architecture {architecture!r}; set "
            f"target_modules to 'all-linear' or some of: {', '.join(endings(linear))}"
        )
    return list(KNOWN[architecture])


def _named(patterns: Iterable[str], linear: Mapping[str, nn.Module]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in linear if matches(pattern, name)}
        if not found:
            close = difflib.get_close_matches(pattern, endings(linear), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadOptions(
                f"target_modules: no linear layer of the base model is called {pattern!r}{hint} "
                f"(linear layers: {', '.join(endings(linear))})"
            )
        chosen |= found
    return [name for name in linear if name in chosen]


def _in_layers(names: Iterable[str], layers: Sequence[int]) -> list[str]:
    index = {name: int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}
    for wanted in layers:
        if wanted not in index.values():
            allowed = ", ".join(map(str, sorted(set(index.values()))))
            raise BadOptions(f"layers must be among {allowed or 'none'}, got {wanted}")
    return [name for name in index if index[name] in layers]


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` matches the last parts of ``name``'s path, or all of it."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise BadOptions(f"{pattern!r} is not a regular expression ({error})") from None


def endings(names: Iterable[str]) -> list[str]:
    """Return the last parts of the names' paths, sorted, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def shape(module: Any) -> tuple[int, int]:
    """Return ``(out_features, in_features)``, also where the weight is packed or transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx
