"""Whether what an engine measures is true, and which engine measures it.

Nothing is believed: at the start of every private assignment a few examples' gradients are compared
with microbatches of one, and an engine that measures something else is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clients.alone import Alone
from clients.per_example import measuring
from clients.samples import Losses, NoPerExampleGradient, singles
from clients.taps import trains
from clients.vmapped import upwards

_LOG = logging.getLogger(__name__)
_SHAKE = 0.02


def chosen(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    engines: Collection[str],
    batch: Any,
    losses_fn: Losses[Any],
) -> str:
    """Return the first of ``engines`` that measures what microbatches of one do.

    Dropout is off meanwhile, other draws are the same for all, and the parameters are moved a
    little, because a gradient that is zero at the start (LoRA's A, while B is zero) shows nothing.
    Parameters, ``p.grad``, modes and torch's generators are as before afterwards. As costly as two
    steps of ``batch`` and one of each example: meant for two or three.

    Args:
        model: the whole task model, in train mode.
        params: all of its trainable parameters.
        engines: names, in the order in which to try them.
        batch: some examples.
        losses_fn: forward pass.

    Raises:
        NoPerExampleGradient: if there is none, with the reason of the last.
    """
    before = {name: p.grad for name, p in params.items()}
    failure = NoPerExampleGradient("no engine was declared to measure per-example gradients")
    try:
        with _shaken(params), deterministic(model):
            reference = _reference(params, batch, losses_fn)
            for engine in engines:
                try:
                    _compare(model, params, engine, batch, losses_fn, reference)
                    return engine
                except NoPerExampleGradient as error:
                    _LOG.warning("engine %s does not measure this model: %s", engine, error)
                    failure = error
    finally:
        for name, p in params.items():
            p.grad = before[name]
    raise failure


def _reference(
    params: Mapping[str, nn.Parameter], batch: Any, losses_fn: Losses[Any]
) -> list[dict[str, Tensor]]:
    """Return the gradients of each example by itself."""
    found = []
    for one in singles(batch):
        torch.manual_seed(0)
        measured = Alone(params).gradients(one, losses_fn, check=False)
        found.append({name: samples.dense()[0] for name, samples in measured.items()})
    return found


def _compare(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    engine: str,
    batch: Any,
    losses_fn: Losses[Any],
    reference: list[dict[str, Tensor]],
) -> None:
    torch.manual_seed(0)
    with measuring(model, params, engine) as measure:
        if isinstance(measure, Alone):
            return  # it is the reference
        found = measure.gradients(batch, losses_fn, check=False)
    measured = {name: samples.dense() for name, samples in found.items()}
    tolerance = _tolerance(model)
    for index, wanted in enumerate(reference):
        whole = torch.stack([one.norm() for one in wanted.values()]).norm()
        for name, one in wanted.items():
            # A gradient that is small because parts of it cancel has the rounding of the parts.
            allowed = tolerance * (one.norm() + 0.1 * whole)
            if one.isfinite().all() and not (measured[name][index] - one).norm() <= allowed:
                raise NoPerExampleGradient(
                    f"{name}: what is measured of one example is more than {tolerance:g} "
                    "(relative) away from its true gradient"
                )


def _tolerance(model: nn.Module) -> float:
    """Return how far off a gradient may be, relative to its norm.

    In float32 it is rounding of some 1e-6, whichever way it is computed; a wrong rule is off by
    about 1. In lower precision how sums are rounded depends on how many examples are in a batch,
    so that the reference itself is no better than some units of the last place: measured 3 of them
    (0.025 in bfloat16), allowed 8.
    """
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    return max(1e-5, 8 * coarsest)


@contextmanager
def _shaken(params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Move parameters by small random numbers, always the same."""
    source = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in params.items()}
    try:
        for p in params.values():
            drawn = torch.randn(p.shape, generator=source)
            p.data.add_(drawn.to(p.device, p.dtype), alpha=_SHAKE)
        yield
    finally:
        for name, p in params.items():
            p.data.copy_(before[name])


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and keep torch's generators as they are.

    What trains stays in train mode, and so does the layer around it: Opacus skips others, and
    methods exist (MonteCLoRA, VeLoRA) that compute something else in evaluation.
    """
    modules = dict(model.named_modules())
    modes = {module: module.training for module in modules.values()}
    trained = [name for name, module in modules.items() if trains(module)]
    kept = {module for path in trained for _, module in upwards(model, path)}
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        try:
            for module, mode in modes.items():
                module.training = mode and module in kept
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
