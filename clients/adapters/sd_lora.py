"""SD-LoRA: earlier tasks are frozen directions, of which every task trains the magnitudes anew.

Source: SD-LoRA, arXiv 2501.13198. With t tasks a layer computes ``W0 x + sum_i a_i (B_i A_i) x /
(|B_i| |A_i|) + a_t B_t A_t x``: the directions of earlier tasks are frozen, the new pair and all
``a_i`` train. One adapter holds them all and needs no word of which task an input belongs to. The
strategy ``sd-lora`` makes directions of what was learned when the next task begins.

The official code (WuYichen-97/SD-Lora-CL) evaluates with the last pair alone, because it assigns
where it should add; here the sum is what is trained and what is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clients import lora_layers
from clients.adapters.lora_sb import Core
from clients.adapters.peft import TRAINED, Method, PeftLora, plugin
from clients.lora_layers import MAGNITUDES, A, AdapterMismatch, B
from strategies.base import Tensors
from strategies.directions import PAST_A, PAST_B, summed
from strategies.plugins import Plugin

SD_LORA = Method(
    "sd-lora",
    "LoRA over frozen directions of earlier tasks, whose magnitudes train on.",
    "2501.13198",
    {},
    frozenset({"low-rank", "merge", "dp-vmap", "zero-b"}),
)


@dataclass(frozen=True, slots=True)
class SdLoRA(PeftLora):
    """LoRA with ``NAME.lora_magnitudes`` ``[tasks]``, the last one the trained pair's.

    From the second task on there are ``NAME.past_A.weight`` ``[ranks, in_features]`` and
    ``NAME.past_B.weight`` ``[out_features, ranks]`` beside it: the pairs of earlier tasks, all of
    one rank, each of norm 1. They never train.
    """

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train: the directions of earlier tasks."""
        return r".*\.past_[AB]\.weight"

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter of a first task into ``backbone``; see :class:`PeftLora`."""
        model = PeftLora.attach(self, backbone, underlay)
        for layer in lora_layers.adapted(model, TRAINED).values():
            down = layer.lora_A[TRAINED].weight
            one = nn.Parameter(torch.ones(1, device=down.device))
            layer.lora_magnitudes = nn.ParameterDict({TRAINED: one})
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_magnitudes")
            layer.lora_variant[TRAINED] = _Directions()
        return model

    def factored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the same delta as plain factors: all pairs stacked, magnitudes in B."""
        return summed(tensors)

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the adapter's tensors, directions of earlier tasks included."""
        tensors = PeftLora.read(self, model)
        for name, layer in lora_layers.adapted(model, TRAINED).items():
            for part, past in zip((PAST_A, PAST_B), layer.lora_variant[TRAINED].past, strict=False):
                tensors[name + part] = past.to("cpu", copy=True)
        return tensors

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` into the adapter, of as many tasks as they have.

        Raises:
            AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer; nothing
                is written then.
        """
        layers = lora_layers.adapted(model, TRAINED)
        past = {name: _past(name, layer, tensors) for name, layer in layers.items()}
        own = {n: t for n, t in tensors.items() if not n.endswith((PAST_A, PAST_B))}
        before = {name: layer.lora_magnitudes[TRAINED] for name, layer in layers.items()}
        for name, layer in layers.items():
            old, new = before[name], tensors[name + MAGNITUDES]
            if old.shape != new.shape:
                fresh = nn.Parameter(old.new_empty(new.shape), requires_grad=old.requires_grad)
                layer.lora_magnitudes[TRAINED] = fresh
        try:
            lora_layers.write(model, TRAINED, own)
        except AdapterMismatch:
            for name, layer in layers.items():
                layer.lora_magnitudes[TRAINED] = before[name]
            raise
        for name, layer in layers.items():
            layer.lora_variant[TRAINED].past = past[name]


class _Directions(Core):
    """What PEFT's layer asks of a variant, for a pair above frozen ones.

    Attributes:
        past: the frozen A and B of all earlier tasks; nothing on a first task.
    """

    def __init__(self) -> None:
        self.past: tuple[Tensor, ...] = ()

    def forward(  # type: ignore[override]  # the parent has no state, and needs no instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return ``result + scaling * (sum a_i B_i A_i x + a_t B_t A_t x)``."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitudes = module.lora_magnitudes[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(down.weight.dtype))
        delta = up(down(x)) * magnitudes[-1]
        if self.past:
            a, b = self.past
            each = magnitudes[:-1].repeat_interleave(len(a) // (len(magnitudes) - 1))
            delta = delta + functional.linear(functional.linear(x, a) * each, b)
        changed: Tensor = result + (delta * module.scaling[active_adapter]).to(result.dtype)
        return changed

    @staticmethod
    def _delta(module: Any, adapter: str) -> Tensor:
        whole = {
            A: module.lora_A[adapter].weight,
            B: module.lora_B[adapter].weight,
            MAGNITUDES: module.lora_magnitudes[adapter],
            **dict(zip((PAST_A, PAST_B), module.lora_variant[adapter].past, strict=False)),
        }
        plain = summed(whole)
        product = plain[B] @ plain[A]
        delta: Tensor = (product.T if module.fan_in_fan_out else product) * module.scaling[adapter]
        return delta.detach()


def _past(name: str, layer: Any, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return copies of the directions of earlier tasks at a layer, where it computes.

    Raises:
        AdapterMismatch: if they do not fit the layer, the magnitudes, or each other.
    """
    if name + MAGNITUDES not in tensors:
        raise AdapterMismatch(
            f"the adapter has no tensor {name + MAGNITUDES}; it was trained by another method, or "
            "on other target_modules"
        )
    tasks = tensors[name + MAGNITUDES].numel() - 1
    found = [tensors.get(name + part) for part in (PAST_A, PAST_B)]
    if not tasks and found == [None, None]:
        return ()
    down, up = found
    fits = down is not None and up is not None and down.ndim == up.ndim == 2
    if fits and down is not None and up is not None:
        ranks = len(down)
        wanted = [ranks, layer.in_features], [layer.out_features, ranks]
        fits = tasks > 0 and ranks > 0 and ranks % tasks == 0
        fits = fits and (list(down.shape), list(up.shape)) == wanted
        if fits:
            device = layer.lora_A[TRAINED].weight.device
            return tuple(t.detach().to(device, torch.float32, copy=True) for t in (down, up))
    shapes = [None if t is None else list(t.shape) for t in found]
    raise AdapterMismatch(
        f"{name} has {tasks} magnitudes of earlier tasks, and past_A and past_B of shapes "
        f"{shapes}; they must be [ranks, {layer.in_features}] and [{layer.out_features}, ranks], "
        "and each task have as many ranks"
    )


def plugins() -> Iterator[Plugin]:
    """Yield SD-LoRA."""
    yield plugin(SD_LORA, SdLoRA)
