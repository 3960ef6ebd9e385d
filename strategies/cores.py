"""Low-rank layers with a core: ``scaling * B core A``, of which only the core trains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import CORE, NotLowRank, lora_layers

CORE_AND_HEAD = r".*\.lora_core\.weight|head\..*"
"""What is trained where both factors are frozen; see :class:`strategies.base.Broadcast`."""


class Cored(NamedTuple):
    """One layer: its base weight changes by ``scaling * b @ core @ a``.

    Attributes:
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``.
        core: ``[rank, rank]``.
        scaling: 0-d.
    """

    a: Tensor
    b: Tensor
    core: Tensor
    scaling: Tensor


def check_cores(tensors: Tensors) -> None:
    """Refuse an adapter that does not train cores.

    What stands beside them may be in the base model alone (CURLoRA's columns and rows), and is no
    matter then.

    Raises:
        NotLowRank: as :func:`cored_layers`; or if a core is not ``[rank, rank]``.
    """
    cores = {name: tensor for name, tensor in tensors.items() if name.endswith(CORE)}
    if not cores or any(".lora_" in name for name in tensors.keys() - cores.keys()):
        cored_layers(tensors)
    for name, core in cores.items():
        if core.ndim != 2 or len(core) != core.shape[1]:
            raise NotLowRank(f"{name} must be [rank, rank], got {list(core.shape)}")


def cored_layers(tensors: Tensors) -> dict[str, Cored]:
    """Return the layers of an adapter by layer name, sorted; other tensors are left out.

    Raises:
        NotLowRank: if there is none, or one lacks its core, a factor or its scaling, or the shapes
            do not fit each other.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(CORE)}
    layers = {}
    for layer, (a, b, scaling) in lora_layers(plain).items():
        core = tensors.get(layer + CORE)
        if core is None:
            raise NotLowRank(
                f"layer {layer!r} has no core between its factors ({layer + CORE}); use adapter "
                "lora-sb"
            )
        if list(core.shape) != [len(a), len(a)]:
            raise NotLowRank(
                f"layer {layer!r} has a core of shape {list(core.shape)}; at its rank it must be "
                f"{[len(a), len(a)]}"
            )
        layers[layer] = Cored(a, b, core, scaling)
    return layers
