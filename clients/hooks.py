"""Per-example gradients by Opacus' hooks, which know more kinds of layers than taps do.

What the hooks measure is checked rather than believed: adapters exist for which they measure
nothing, or something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients.samples import (
    Dense,
    Gradients,
    Losses,
    NoPerExampleGradient,
    missing,
    refuse_mixed,
)

_HOOK_LEFTOVERS = {
    "activations",
    "max_batch_len",
    "autograd_grad_sample_hooks",
    "ft_compute_sample_grad",
    "grad_sample",
    "_current_grad_sample",
    "_forward_counter",
    "_norm_sample",
    "summed_grad",
}
_CONSERVATION = 1e-3  # relative to the summed norms: float32 rounding is 1e-6, a wrong rule is 1


@contextmanager
def hooked(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Hooks]:
    """Measure per-example gradients of ``params`` inside; leave no trace outside.

    Raises:
        NoPerExampleGradient: if a layer cannot be hooked.
    """
    from opacus.grad_sample import GradSampleHooks  # takes two seconds; training without DP is free

    layers = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(False))]
    try:
        try:
            GradSampleHooks(model, loss_reduction="sum", strict=True)
        except (NotImplementedError, ValueError) as error:
            raise NoPerExampleGradient(f"a trainable layer cannot be hooked: {error}") from error
        yield Hooks(params)
    finally:
        # Not by Opacus' own cleanup, which forgets attributes and needs its constructor's success.
        for handle in getattr(model, "autograd_grad_sample_hooks", ()):
            handle.remove()
        _forget([model, *layers, *model.parameters()])


@dataclass(frozen=True, slots=True)
class Hooks:
    """The engine of Opacus' hooks.

    Attributes:
        params: all that trains, by name.
    """

    params: Mapping[str, nn.Parameter]

    def gradients(self, batch: Any, losses_fn: Losses[Any], *, check: bool) -> Gradients:
        """See :class:`clients.samples.Engine`.

        With ``check``, they must add up to what autograd gives for the sum of the losses: true in
        any mode, dropout and checkpointing included, and false for a wrong rule or a hidden path.
        """
        try:
            losses = losses_fn(batch)
            refuse_mixed(losses)
            samples = self._samples(losses)
            if check:
                for name, p in self.params.items():
                    _check_sum(name, samples[name], p.grad)
            return {name: Dense(sample) for name, sample in samples.items()}
        finally:
            for p in self.params.values():
                p.grad = p.grad_sample = None  # type: ignore[attr-defined]  # Opacus' attribute

    def _samples(self, losses: Tensor) -> dict[str, Tensor]:
        """Return what the hooks measure in the backward pass."""
        try:
            with warnings.catch_warnings():
                # The first trainable layer's input needs no gradient; its hook does not use one.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                torch.autograd.backward(losses.sum())
            return {n: _sample(n, p, len(losses)) for n, p in self.params.items()}
        except (ValueError, AttributeError, TypeError, IndexError, NotImplementedError) as error:
            raise NoPerExampleGradient(
                f"per-example gradients failed ({type(error).__name__}): the model must be in "
                "train mode, and gradient checkpointing must be reentrant"
            ) from error


def _sample(name: str, parameter: nn.Parameter, batch: int) -> Tensor:
    sample = getattr(parameter, "grad_sample", None)
    expected = (batch, *parameter.shape)
    found = tuple(sample.shape) if isinstance(sample, Tensor) else None
    if not isinstance(sample, Tensor) or found != expected:
        error = missing(name, parameter.shape, found)
        raise NoPerExampleGradient(f"{error}, or gradient checkpointing is not reentrant")
    return sample


def _check_sum(name: str, sample: Tensor, gradient: Tensor | None) -> None:
    total = torch.zeros_like(sample[0]) if gradient is None else gradient
    error = (sample.sum(0) - total).norm()
    if error > _CONSERVATION * sample.flatten(1).norm(dim=1).sum() + 1e-7:
        raise NoPerExampleGradient(
            f"{name}: the examples' gradients do not add up to the batch's; this adapter or model "
            "cannot be trained with DP-SGD"
        )


def _forget(holders: Iterable[nn.Module | nn.Parameter]) -> None:
    """Remove all attributes that Opacus leaves."""
    for holder in holders:
        for name in _HOOK_LEFTOVERS & vars(holder).keys():
            delattr(holder, name)
