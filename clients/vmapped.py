"""Per-example gradients of adapted layers of any kind, by ``vmap`` over their backward pass.

An *adapted layer* is a frozen layer with what trains beside it. Where that is more than plain
linear layers (DoRA's magnitudes, KaSA's diagonal, MonteCLoRA's posterior), no rule is known for it,
and none is needed: in the backward pass the layer is run once more for each example by itself, with
torch.func's ``vmap(vjp(functional_call))``. All else in the model, attention and masks and norms,
runs for the batch as it always does; plain linear layers that train elsewhere are tapped.

It costs one more forward pass of the adapted layers. Kept for it are their inputs alone. What is
computed from parameters alone (DoRA's norms) is computed once for all examples.

Dropout is drawn for each example. Without dropout, what a layer draws is one draw for all examples
of a forward pass, as in a step without privacy: so MonteCLoRA samples its A. Either depends on no
data. Drawn again in the backward pass, it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.dropout import _DropoutNd

from clients.checkpoint import generators, set_generators
from clients.samples import Dense, NoPerExampleGradient, Samples
from clients.taps import Tap, Taps, linear_taps, tappable, tapping, trains

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict, nn.ParameterList)


@contextmanager
def vmapped(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Taps]:
    """Measure per-example gradients of ``params`` inside; leave no trace outside.

    Args:
        model: whose trainable parameters are all in plain linear or adapted layers. An adapted
            layer takes one tensor, and all that it takes of the examples is in it.
        params: all of them.

    Raises:
        NoPerExampleGradient: if a parameter is in neither.
    """
    adapted = adapted_layers(model)
    inside = {id(module) for layer in adapted for module in layer.modules()}
    taps: list[Tap] = [tap for tap in linear_taps(model) if id(tap.layer) not in inside]
    with tapping(params, [*taps, *map(_LayerTap, adapted)]) as engine:
        yield engine


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers around every parameter that trains outside of plain linear layers.

    Raises:
        NoPerExampleGradient: if there is none around one.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not trains(module) or tappable(module):
            continue
        *_, (path, layer) = upwards(model, name)
        if not path:
            raise NoPerExampleGradient(
                f"{name or 'the model'} trains, and is neither a linear layer nor a part of one "
                "that is frozen but for it"
            )
        found[path] = layer
    return [one for path, one in found.items() if not any(path.startswith(f"{p}.") for p in found)]


def upwards(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the module at ``path`` and those around it, up to the layer that it is a part of.

    That is the smallest module with a forward pass of its own that holds frozen parameters too; or
    the whole ``model``, whose path is empty.
    """
    while True:
        module = model.get_submodule(path)
        yield path, module
        frozen = any(not p.requires_grad for p in module.parameters())
        if not path or (frozen and not isinstance(module, _CONTAINERS)):
            return
        path = path.rpartition(".")[0]


class _LayerTap:
    """The tap of one adapted layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls: dict[int, list[Samples]] = {}
        self._inner = _Unhooked(layer)
        self._params = {n: p for n, p in self._inner.named_parameters() if p.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the layer computes, and remember its input."""
        inputs, rest = args[0], (*args[1:], *kwargs.values())
        if not isinstance(inputs, Tensor) or any(isinstance(one, Tensor) for one in rest):
            raise NoPerExampleGradient("an adapted layer must take one tensor, [batch, ...]")
        call = _Call(self, args[1:], kwargs)
        found: Tensor = _Layer.apply(call, inputs, *self._params.values())  # type: ignore[no-untyped-call]
        return found

    def values(self) -> dict[str, Tensor]:
        """Return what trains in the layer, without its graph."""
        return {name: p.detach() for name, p in self._params.items()}

    def run(self, values: Mapping[str, Tensor], inputs: Tensor, call: _Call) -> Tensor:
        """Compute what the layer computes of one example ``[...]``, with ``values`` in place."""
        args = (inputs[None], *call.args)
        found: Tensor = functional_call(self._inner, dict(values), args, call.kwargs)[0]
        return found

    def note(self, gradients: Mapping[str, Tensor]) -> None:
        """Keep the gradients of one call, ``[batch, *shape]`` each."""
        for name, p in self._params.items():
            self.calls.setdefault(id(p), []).append(Dense(gradients[name]))


class _Unhooked(nn.Module):
    """A layer's own forward pass: without the tap in its place, and without hooks, which ran."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


class _Call:
    """One call of an adapted layer: what it was given besides examples, and how it was computed."""

    def __init__(self, tap: _LayerTap, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.tap, self.args, self.kwargs = tap, args, dict(kwargs)
        drops = (m for m in tap.layer.modules() if isinstance(m, _DropoutNd))
        dropping = any(m.p > 0 for m in drops)
        self.randomness = "different" if dropping else "same"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs for ``inputs`` ``[batch, ...]``."""
        self.device = str(inputs.device)
        kind = inputs.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.state = generators(self.device)
        values = self.tap.values()
        each = vmap(lambda x: self.tap.run(values, x, self), randomness=self.randomness)
        found: Tensor = each(inputs)
        return found

    def backward(self, inputs: Tensor, outer: Tensor, further: bool) -> Tensor | None:
        """Note each example's gradients; return those of ``inputs`` if they go ``further``."""
        values = self.tap.values()

        def gradients(x: Tensor, g: Tensor) -> tuple[Any, ...]:
            if further:
                found = vjp(lambda v, x: self.tap.run(v, x, self), values, x)[1](g)
            else:
                found = vjp(lambda v: self.tap.run(v, x, self), values)[1](g)
            return tuple(found)

        now = generators(self.device)
        kind, dtype, enabled = self.autocast
        set_generators(self.state, self.device)
        try:
            with torch.autocast(kind, dtype, enabled):
                found = vmap(gradients, randomness=self.randomness)(inputs, outer)
        finally:
            set_generators(now, self.device)
        self.tap.note(found[0])
        return found[1] if further else None


class _Layer(torch.autograd.Function):
    """An adapted layer whose backward pass tells its tap, and gives its parameters no gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, inputs: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.call = call
        with _functorch_errors():
            return call.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        with _functorch_errors():
            found = ctx.call.backward(inputs, gradients[0], ctx.needs_input_grad[1])
        return None, found, *[None] * (len(ctx.needs_input_grad) - 2)


@contextmanager
def _functorch_errors() -> Iterator[None]:
    """Say of what ``vmap`` cannot run that there is another engine for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
        raise NoPerExampleGradient(
            f"an adapted layer cannot be run an example at a time ({type(error).__name__})"
        ) from error
