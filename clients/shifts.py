"""Whole parameters of the base model that train too: biases, layer norms, embeddings.

PEFT trains copies of them (``bias``, ``modules_to_save``). Here the base model stays as it is, and
what trains is the *change*: ``NAME.shift.weight`` or ``NAME.shift.bias``, of the parameter's shape,
zero at first and float32. The layer computes with the sum, in the base model's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clients import placement
from clients.lora_layers import AdapterMismatch
from strategies.base import Tensors
from strategies.plugins import BadOptions

SHIFT = ".shift."
_WRAPPED = ".base_layer"


class Place(NamedTuple):
    """A parameter of the base model that is to train.

    Attributes:
        layer: its module's name in the base model.
        module: the module.
        part: ``weight``, ``bias``, or what the module calls it.
    """

    layer: str
    module: nn.Module
    part: str


class _Sum(nn.Module):
    def __init__(self, original: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(original, dtype=torch.float32)
        self.change = nn.Parameter(zeros)

    def forward(self, original: Tensor) -> Tensor:
        return (original + self.change).to(original.dtype)


def places(
    backbone: nn.Module, adapted: Collection[str], bias: str, modules: Sequence[str]
) -> list[Place]:
    """Return the parameters that ``bias`` and ``modules_to_save`` mean, in the model's order.

    Args:
        backbone: the base model, with nothing attached.
        adapted: names of the layers that low-rank factors are put on.
        bias: ``none``, ``lora_only`` (of the adapted layers) or ``all``.
        modules: names of modules, patterns of the last parts of their paths, whose parameters all
            train.

    Raises:
        BadOptions: if there is no such bias or module, a parameter is quantised or shared by two
            layers, or a module has an adapted layer in it.
    """
    found = list(_named(backbone, adapted, modules)) if modules else []
    if bias != "none":
        biases = [p for p in _parameters(backbone) if p.part == "bias"]
        biases = [p for p in biases if bias == "all" or p.layer in adapted]
        if not biases:
            raise BadOptions(
                f"bias: {bias} trains biases, and {_which(bias)} of this base model have none; "
                "leave bias out"
            )
        taken = {(p.layer, p.part) for p in found}
        found += [p for p in biases if (p.layer, p.part) not in taken]
    _refuse_unfit(backbone, found)
    return found


def attach(wanted: Sequence[Place]) -> None:
    """Have each parameter be the sum of itself and a change that trains."""
    for place in wanted:
        original = getattr(place.module, place.part)
        parametrize.register_parametrization(place.module, place.part, _Sum(original), unsafe=True)


def detach(model: nn.Module) -> None:
    """Take every change out of ``model`` again; its parameters are those that were there before."""
    for place, _ in list(_attached(model)):
        parametrize.remove_parametrizations(place.module, place.part, leave_parametrized=False)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the live changes by name, in the model's order."""
    return {place.layer + SHIFT + place.part: change for place, change in _attached(model)}


def split(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an adapter's tensors as (those that are no changes, the changes)."""
    own = {name: tensor for name, tensor in tensors.items() if SHIFT in name}
    return {name: tensor for name, tensor in tensors.items() if name not in own}, own


def check(model: nn.Module, changes: Tensors) -> None:
    """Refuse changes that do not fit ``model``.

    Raises:
        AdapterMismatch: if one is missing, unexpected, or of another shape.
    """
    live = parameters(model)
    for name in sorted(live.keys() ^ changes.keys()):
        what = "has no tensor" if name in live else "has the tensor"
        raise AdapterMismatch(
            f"the adapter {what} {name}; set bias and modules_to_save as they were when it was "
            "trained"
        )
    for name, parameter in live.items():
        if changes[name].shape != parameter.shape:
            wanted, got = list(parameter.shape), list(changes[name].shape)
            raise AdapterMismatch(f"{name} must be {wanted}, got {got}")


def write(model: nn.Module, changes: Tensors) -> None:
    """Put changes that :func:`check` has seen into ``model``."""
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(changes[name])


def sums(backbone: nn.Module, changes: Tensors) -> dict[str, Tensor]:
    """Return what the changed parameters are, by the base model's names, in its dtype.

    Raises:
        AdapterMismatch: if the base model has no such parameter, or one of another shape.
    """
    base: Mapping[str, Tensor] = dict(backbone.named_parameters())
    made = {}
    for name, change in changes.items():
        own = name.replace(SHIFT, ".")
        if own not in base or base[own].shape != change.shape:
            raise AdapterMismatch(f"the base model has no parameter {own} of the shape of {name}")
        made[own] = (base[own].detach().cpu() + change).to(base[own].dtype)
    return made


def _which(bias: str) -> str:
    return "the adapted layers" if bias == "lora_only" else "the layers"


def _parameters(backbone: nn.Module) -> Iterator[Place]:
    for layer, module in backbone.named_modules():
        for part, _ in module.named_parameters(recurse=False):
            yield Place(layer, module, part)


def _named(
    backbone: nn.Module, adapted: Collection[str], patterns: Sequence[str]
) -> Iterator[Place]:
    names = [name for name, _ in backbone.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if placement.matches(pattern, name)]
        if not found:
            raise BadOptions(
                f"modules_to_save: no module of the base model is called {pattern!r} "
                f"(there are: {', '.join(placement.endings(names))})"
            )
        chosen.update(found)
    for place in _parameters(backbone):
        within = [n for n in chosen if place.layer == n or place.layer.startswith(f"{n}.")]
        if within and place.layer in adapted:
            raise BadOptions(
                f"modules_to_save: {within[0]} has {place.layer} in it, which has low-rank factors "
                "already; name another module, or leave it out of target_modules"
            )
        if within:
            yield place


def _refuse_unfit(backbone: nn.Module, found: Sequence[Place]) -> None:
    owners: dict[int, list[str]] = {}
    for layer, module in backbone.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    for place in found:
        parameter = getattr(place.module, place.part)
        if not parameter.is_floating_point():
            raise BadOptions(
                f"modules_to_save: {place.layer} is quantised, and only what is not can train "
                "whole; name another module, or quantization: none"
            )
        if len(sharing := owners[id(parameter)]) > 1:
            raise BadOptions(
                f"modules_to_save: {' and '.join(sharing)} share one {place.part}, of which both "
                "would change; adapt them by target_modules"
            )


def _attached(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        held: Any = module.parametrizations
        for part, parts in held.items():
            if isinstance(parts[0], _Sum):
                yield Place(name.removesuffix(_WRAPPED), module, part), parts[0].change
