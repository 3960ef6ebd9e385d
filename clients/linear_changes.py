"""What an attached adapter adds to each linear layer, as a matrix, or the reason why it is none.

It is measured: a layer that adds a linear map adds, to the rows of the identity, the rows of that
map's transpose. So every method of PEFT's is read in the same way, whatever its arithmetic is.
PEFT's own ``convert_to_lora`` (0.21) is not enough: it drops the magnitude of DoRA without a word,
knows neither AdaLoRA, HiRA, IA3 nor the OFT family, and does not say what is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients import placement

_ROWS = 1024  # of the identity at once
_TOKENS = 16


class NotLinear(ValueError):
    """What this adapter changes is not a matrix that is added to the weight of linear layers."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What went into a layer and came out of it while the whole model ran."""

    inputs: Tensor
    output: Tensor


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of every linear layer's weight, by the layer's name."""
    return {name: _digest(layer) for name, layer in placement.linear_layers(model).items()}


def linear_changes(
    model: Any, prefix: str, untouched: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted layer's name and the matrix that the adapter adds to its weight.

    One matrix at a time. Each is checked against what the layer did within the whole model, on
    some tokens, so that a layer that looks at more than its input is found.

    Args:
        model: a base model of float32 with PEFT layers in it, in evaluation mode.
        prefix: of PEFT's before the base model's names; "" for a model that is not wrapped.
        untouched: the base model's :func:`weight_digests`, before the adapter.

    Yields:
        Name and matrix ``[out_features, in_features]``, in the model's order.

    Raises:
        NotLinear: naming what is changed in another way.
    """
    layers = _adapted(model, prefix)
    seen = _run(model, layers)
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        if _digest(base) != untouched.get(name):
            raise NotLinear(f"it changes the base weights of {name} themselves")
        if name not in seen:
            raise NotLinear(f"{name} takes no part in the model by itself")
        change = _matrix(name, layer, base)
        expected = seen[name].inputs @ change.T
        found = seen[name].output - base(seen[name].inputs)
        if not _same(found, expected, seen[name].output):
            raise NotLinear(f"what it adds to {name} is not a linear function of the layer's input")
        yield name, change


def _adapted(model: nn.Module, prefix: str) -> dict[str, Any]:
    """Return the adapted layers by the base model's names; all must be linear layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        short = name.removeprefix(prefix)
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise NotLinear(f"it trains {short} as a whole")
        if isinstance(module, BaseTunerLayer):
            layers[short] = module
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not placement.is_linear(base):
            raise NotLinear(f"it changes {name}, a {type(base).__name__}, and no linear layer")
    if not layers:
        raise NotLinear("it changes no linear layer")
    return layers


@torch.no_grad()
def _run(model: Any, layers: Mapping[str, Any]) -> dict[str, _Seen]:
    """Run the model on some tokens; return what went through each layer."""
    seen: dict[str, _Seen] = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = _Seen(given[0].clone(), output.clone())

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keep(name)).remove)
        try:
            model(input_ids=torch.arange(min(model.config.vocab_size, _TOKENS))[None])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise NotLinear(f"the model needs more than a text to run with it ({reason})") from None
    return seen


@torch.no_grad()
def _matrix(name: str, layer: Any, base: Any) -> Tensor:
    _, in_features = placement.shape(base)
    zero = torch.zeros(1, 1, in_features)
    if (layer(zero) - base(zero)).norm() > 1e-5 * base(zero).norm():
        raise NotLinear(f"it changes the bias of {name}, for which LoRA's files have no place")
    rows = []
    for start in range(0, in_features, _ROWS):
        stop = min(start + _ROWS, in_features)
        inputs = torch.zeros(1, stop - start, in_features)
        inputs[0, :, start:stop].fill_diagonal_(1)
        rows.append((layer(inputs) - base(inputs))[0])
    return torch.cat(rows).T


def _same(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    """Return whether two results are equal but for rounding, of values as large as ``scale``."""
    return bool((one - other).norm() <= 1e-3 * other.norm() + 1e-5 * scale.norm())


def _digest(layer: Any) -> str:
    data = layer.weight.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(memoryview(data)).hexdigest()
