"""What an adapter does to each layer, as far as many of them can be computed in one batch.

A batch holds examples of different adapters, so each layer adds to its output what is linear in its
input and different by example: a product of two thin factors (``bmm``), a factor per output
(DoRA's magnitudes over the norms of the weights that they belong to, arXiv:2402.09353, equation 5)
and a bias. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients import placement
from clients.lora_layers import without_head
from clients.shifts import SHIFT
from strategies.base import Tensors

_A, _B, _SCALING, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "scaling", "lora_magnitude_vector"
_BLOCKS_A, _BLOCKS_B, _BIAS = "lora_A.blocks", "lora_B.blocks", "shift.bias"
_PARTS = (_A, _B, _SCALING, _MAGNITUDE, _BLOCKS_A, _BLOCKS_B, _BIAS)
_TRAINING_ONLY = ".lora_monteclora_sampler."
_ROWS = 1024  # of a weight at a time, when norms are taken


class Unservable(ValueError):
    """This adapter, or this base model, cannot be served."""


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to the output ``W x + c`` of one linear layer.

    The output becomes ``gain * (W x) + b (a x) + c + bias``.

    Attributes:
        a: ``[rank, in]``; rank 0 where nothing is added.
        b: ``[out, rank]``, with the scaling and DoRA's gain in it.
        gain: ``[out]``, or None for 1.
        bias: ``[out]``, or None for 0.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of what is added."""
        return int(self.a.shape[0])

    @property
    def size_bytes(self) -> int:
        """Memory that it takes by itself."""
        parts = (self.a, self.b, self.gain, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def changes_of(backbone: nn.Module, tensors: Tensors) -> dict[str, Change]:
    """Return what an adapter does to each linear layer, by the base model's names.

    Args:
        backbone: the base model.
        tensors: all that the adapter is, by weft's names; a head is left out.

    Raises:
        Unservable: if it does anything that different examples of a batch cannot have differently,
            or does not fit the base model.
    """
    linear = placement.linear_layers(backbone)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(without_head(tensors).items()):
        if _TRAINING_ONLY in name:
            continue
        layer, part = _split(name)
        if layer not in linear:
            raise Unservable(
                f"the base model has no linear layer {layer}; the adapter is another's: serve it "
                "on its own with --base"
            )
        layers.setdefault(layer, {})[part] = tensor
    return {name: _change(name, linear[name], parts) for name, parts in layers.items()}


def _split(name: str) -> tuple[str, str]:
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    if SHIFT in name:
        raise Unservable(
            f"the adapter trained {name.replace(SHIFT, '.')} whole, which differs by adapter and "
            "cannot be computed in one batch with others; train without modules_to_save"
        )
    if name.endswith(".invocation"):
        raise Unservable(
            "the adapter is an aLoRA, which acts from its invocation tokens on, and in a batch all "
            "tokens of an example have one adapter; export it, and serve it with vLLM or PEFT"
        )
    raise Unservable(
        f"the adapter has {name}, which is no low-rank factor; LoRA, rsLoRA, DoRA, BD-LoRA, their "
        "stacks and merges, and trained biases of linear layers are served: convert it with "
        "weft export --as lora"
    )


def _change(name: str, module: nn.Module, parts: Mapping[str, Tensor]) -> Change:
    out_features, in_features = placement.shape(module)
    a, b = _factors(name, (out_features, in_features), parts)
    bias = parts.get(_BIAS)
    for tensor in (bias, parts.get(_MAGNITUDE)):
        if tensor is not None and tensor.shape != (out_features,):
            raise Unservable(f"{name} has {out_features} outputs, got {list(tensor.shape)}")
    gain = None
    if _MAGNITUDE in parts:
        gain = parts[_MAGNITUDE].float() / _norms(name, module, a, b)
        b = gain[:, None] * b
    return Change(a, b, gain, None if bias is None else bias.float())


def _factors(
    name: str, shape: tuple[int, int], parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return plain float32 factors, the scaling in B."""
    out_features, in_features = shape
    if parts.keys() <= {_BIAS}:
        return torch.zeros(0, in_features), torch.zeros(out_features, 0)
    a, b = parts.get(_A), parts.get(_B)
    if a is None and _BLOCKS_A in parts:
        a = _diagonal(parts[_BLOCKS_A], in_features)
    if b is None and _BLOCKS_B in parts and a is not None:
        b = _diagonal(parts[_BLOCKS_B], a.shape[0])
    if a is None or b is None or _SCALING not in parts:
        raise Unservable(f"the adapter's layer {name} lacks a factor or its scaling")
    if a.shape != (b.shape[1], in_features) or b.shape[0] != out_features:
        raise Unservable(
            f"{name} is [{out_features}, {in_features}], and the adapter has factors "
            f"{list(b.shape)} and {list(a.shape)}; serve it on its own base model with --base"
        )
    return a.float(), b.float() * parts[_SCALING].float()


def _diagonal(blocks: Tensor, width: int) -> Tensor:
    """Return blocks ``[rows, width / n]`` on the diagonal of ``[rows, width]``."""
    found: Tensor = torch.block_diag(*blocks.chunk(width // blocks.shape[1]))  # type: ignore[no-untyped-call]  # torch's
    return found


def _norms(name: str, module: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return the norms of the rows of ``W + b a``, ``[out]``, in blocks of rows."""
    weight = module.weight
    if not weight.is_floating_point():
        raise Unservable(
            f"the adapter is a DoRA, whose magnitudes need the weights of {name}, and these are "
            "quantised; serve it on a base model with quantization: none"
        )
    whole = weight if isinstance(module, nn.Linear) else weight.T
    found = [
        torch.linalg.norm(part.detach().float().cpu() + b[i * _ROWS : (i + 1) * _ROWS] @ a, dim=1)
        for i, part in enumerate(whole.split(_ROWS))
    ]
    return torch.cat(found)
