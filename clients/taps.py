"""Per-example gradients of plain linear layers, for the price of a plain backward pass.

A tap notes a layer's inputs ``a`` and the gradients ``g`` of its outputs, from which an example's
gradient is ``gᵀ a``. Autograd computes no gradient of the weight beside them, so that a private
step does the work of a plain one (book-keeping, 2210.00038). Kept until the clip is known is what
is smaller: the gradients, or a and g, from which their norms follow too (ghost norms, 2110.05679).
For LoRA's narrow factors it is the gradients, for a wide layer that sees few positions a and g.

Checkpointing of either kind, and lower precision, make no difference to a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from clients.samples import (
    Dense,
    Factored,
    Gradients,
    Losses,
    NoPerExampleGradient,
    Samples,
    missing,
    outer,
    refuse_mixed,
)


class Tap(Protocol):
    """Stands in for a layer's forward pass, and collects what its parameters get.

    Attributes:
        calls: for each parameter, by ``id``, its gradients in one call of the layer after another.
    """

    calls: dict[int, list[Samples]]

    @property
    def layer(self) -> nn.Module:
        """Whose tap this is."""
        ...

    @property
    def forward(self) -> Callable[..., Tensor]:
        """Computes what the layer computes, and remembers it where a gradient is wanted."""
        ...


def tappable(layer: nn.Module) -> bool:
    """Return whether taps know this layer; a subclass may compute something else."""
    return type(layer) is nn.Linear


def trains(module: nn.Module) -> bool:
    """Return whether a module itself holds a parameter that trains."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


@contextmanager
def tapped(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Taps]:
    """Tap every layer of ``model`` that trains inside; leave no trace outside.

    Raises:
        NoPerExampleGradient: naming a layer that trains and is not a plain linear one.
    """
    for name, module in model.named_modules():
        if trains(module) and not tappable(module):
            raise NoPerExampleGradient(f"{name or 'the model'} trains, and is no linear layer")
    with tapping(params, linear_taps(model)) as engine:
        yield engine


def linear_taps(model: nn.Module) -> list[Tap]:
    """Return a tap for every plain linear layer of ``model`` that trains."""
    return [LinearTap(m) for m in model.modules() if isinstance(m, nn.Linear) and trains(m)]


@contextmanager
def tapping(params: Mapping[str, nn.Parameter], taps: list[Tap]) -> Iterator[Taps]:
    """Put ``taps`` in place of their layers' forward passes; leave no trace outside.

    Args:
        params: all that trains, by name; of the layers of the taps.
        taps: of as many layers, none within another.
    """
    try:
        for tap in taps:
            vars(tap.layer)["forward"] = tap.forward
        yield Taps(params, taps)
    finally:
        for tap in taps:
            vars(tap.layer).pop("forward", None)


class LinearTap:
    """The tap of one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.calls: dict[int, list[Samples]] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute what the layer computes, and remember it where a gradient will be wanted."""
        layer = self.layer
        found: Tensor = _Linear.apply(inputs, layer.weight, layer.bias, self)  # type: ignore[no-untyped-call]
        return found

    def note(self, a: Tensor, g: Tensor) -> None:
        """Keep the gradients of one call; whichever is smaller, they or what they are made of."""
        if a.dim() < 2 or a.dim() > 3:
            raise NoPerExampleGradient(
                "a trained linear layer's inputs must be [batch, features] or [batch, positions, "
                f"features], got {a.dim()} dimensions"
            )
        if a.dim() == 2:
            a, g = a[:, None], g[:, None]
        if self.layer.weight.requires_grad:
            positions, narrow, wide = a.shape[1], a.shape[2], g.shape[2]
            ghost = positions * (narrow + wide) < narrow * wide
            self._keep(self.layer.weight, Factored(a, g) if ghost else Dense(outer(g, a)))
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            self._keep(self.layer.bias, Dense(g.sum(1)))

    def _keep(self, parameter: Tensor, samples: Samples) -> None:
        self.calls.setdefault(id(parameter), []).append(samples)


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass tells its tap, and gives its weight no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, tap: LinearTap) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.tap = tap
        return functional.linear(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        a, weight = ctx.saved_tensors
        g = gradients[0].to(a.dtype)  # another one under autocast
        ctx.tap.note(a.detach(), g)
        return g @ weight.to(a.dtype) if ctx.needs_input_grad[0] else None, None, None, None


@dataclass(slots=True)
class Taps:
    """The engine of taps, for models in which nothing trains but in their layers.

    Attributes:
        params: all that trains, by name.
        taps: of their layers.
    """

    params: Mapping[str, nn.Parameter]
    taps: list[Tap]

    def gradients(self, batch: Any, losses_fn: Losses[Any], *, check: bool) -> Gradients:
        """See :class:`clients.samples.Engine`; there is nothing that ``check`` would add."""
        self.forget()
        try:
            losses = losses_fn(batch)
            refuse_mixed(losses)
            torch.autograd.backward(losses.sum())
            for name, p in self.params.items():
                if p.grad is not None:
                    raise NoPerExampleGradient(
                        f"{name}: a part of its gradient goes past its layer, so the examples' "
                        "gradients do not add up to the batch's; this adapter or model cannot be "
                        "trained with DP-SGD"
                    )
            found: dict[int, list[Samples]] = {}
            for tap in self.taps:  # two of them may hold one parameter
                for parameter, calls in tap.calls.items():
                    found.setdefault(parameter, []).extend(calls)
            count = len(losses)
            return {n: _one(n, found.get(id(p), []), p, count) for n, p in self.params.items()}
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop every gradient, also those at the parameters."""
        for p in self.params.values():
            p.grad = None
        for tap in self.taps:
            tap.calls = {}


def _one(name: str, calls: list[Samples], parameter: nn.Parameter, batch: int) -> Samples:
    """Return the gradients of all calls of a layer together."""
    if not calls:
        raise missing(name, parameter.shape, None)
    for call in calls:
        if len(call) != batch:
            raise missing(name, parameter.shape, (len(call), *parameter.shape))
    return calls[0] if len(calls) == 1 else Dense(torch.stack([c.dense() for c in calls]).sum(0))
