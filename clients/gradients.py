"""One batch to ``p.grad``: plain, or DP-SGD (1607.00133) over per-example gradients.

An engine (:mod:`clients.per_example`) measures each example's gradient in the one backward pass of
its microbatch; masking, clipping, summing and noise are done here, so that noise comes from the
client's cryptographic stream, a mask counts before the clip, and microbatches bound the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clients.assignment import Assignment, Clipping
from clients.clipping import Clip, count_noise, gradient_noise, moved
from clients.noise import MARGIN, NoiseStream, discretised, grid_of
from clients.per_example import measuring
from clients.samples import Batch, Dense, Engine, Gradients, Losses, NoPerExampleGradient
from clients.units import OfUnits, of_units
from strategies.base import Tensors

__all__ = ["NoPerExampleGradient", "PrivateGradient", "plain_step", "private_gradient"]


def plain_step(
    params: Mapping[str, nn.Parameter],
    microbatches: Iterable[Batch],
    losses_fn: Losses[Batch],
    total: int,
    mask: Tensors | None = None,
    max_grad_norm: float | None = None,
) -> None:
    """Fill ``p.grad`` with the gradient of the mean loss over a batch, without privacy.

    Args:
        params: what is trained, by name.
        microbatches: the batch in parts.
        losses_fn: forward pass.
        total: examples in all microbatches together, >= 1.
        mask: 0/1 tensors by name; entries at 0 get no gradient.
        max_grad_norm: bound on the norm over all parameters, > 0, or None for none.
    """
    for parameter in params.values():
        parameter.grad = None
    for batch in microbatches:
        torch.autograd.backward(losses_fn(batch).sum() / total)
    for name, parameter in params.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        kept = (mask or {}).get(name)
        parameter.grad = gradient if kept is None else gradient * kept
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(list(params.values()), max_grad_norm)


@dataclass(slots=True)
class PrivateGradient:
    """DP-SGD's gradients for the steps of one assignment.

    A context: entering prepares the model to measure, leaving removes every trace of that, so that
    the model can be used again, privately or not.

    Attributes:
        model: the whole task model, in train mode.
        params: all of its trainable parameters, by the names that noise and mask go by.
        bound: C, on the norm of what one example adds to the sum, over all parameters, > 0. With
            the clipping ``quantile`` it changes from step to step, by what is released.
        noise_multiplier: sigma of a whole step, >= 0: noise of standard deviation sigma * C is
            added to the sum, and a thousandth for rounding; of more with ``quantile``, which
            releases votes besides.
        expected_batch_size: sampling rate times data set size, > 0. The divisor; the number of
            examples that were drawn must not be, it is private.
        stream: where the noise comes from.
        mask: 0/1 tensors by name; entries at 0 are left out before clipping and get no noise.
        clipping: how the bound is kept.
        engine: of :data:`clients.per_example.ENGINES`, one that is known to measure this model's
            gradients, such as :func:`clients.verification.chosen` returns.

    Raises:
        ValueError: if a number is out of range.
    """

    model: nn.Module
    params: Mapping[str, nn.Parameter]
    bound: float
    noise_multiplier: float
    expected_batch_size: float
    stream: NoiseStream
    mask: Tensors = field(default_factory=dict)
    clipping: Clipping = field(default_factory=Clipping)
    engine: str = "taps"
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _checked: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("bound", "expected_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be >= 0, got {self.noise_multiplier}")

    def __enter__(self) -> PrivateGradient:
        """Prepare the model.

        Raises:
            NoPerExampleGradient: if the model mixes examples, the engine does not serve a layer, or
                the model's trainable parameters are not exactly ``params``.
        """
        self._checked = False
        self._engine = self._open.enter_context(measuring(self.model, self.params, self.engine))
        return self

    def __exit__(self, *error: object) -> None:
        self._engine = None
        self._open.close()

    def step(
        self,
        microbatches: Iterable[Batch | OfUnits[Batch]],
        losses_fn: Losses[Batch],
        step: int,
    ) -> None:
        """Fill ``p.grad`` with ``(sum of clipped gradients + noise) / expected_batch_size``.

        The split into microbatches does not matter; none at all (an empty Poisson sample) gives
        noise alone. Nothing else about the examples is returned or kept.

        Args:
            microbatches: the sampled examples in parts, none of them empty. In a part that is of
                units, each unit's examples are clipped as one, by their mean gradient.
            losses_fn: forward pass.
            step: number of the step in this assignment, each used once: it selects the noise.

        Raises:
            NoPerExampleGradient: if a parameter's per-example gradients are missing or wrong.
        """
        for parameter in self.params.values():
            parameter.grad = None
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.params.items()}
        clip = Clip(self.clipping, list(self.params), self.bound)
        votes = 0.0
        for part in microbatches:
            samples = self._measured(part, losses_fn)
            norms = torch.stack([sample.norms() for sample in samples.values()])
            factors = clip.factors(norms)
            for row, (name, sample) in zip(factors, samples.items(), strict=True):
                sums[name] += sample.weighted(row)
            if self.clipping.mode == "quantile":
                votes += float(clip.vote(norms))
        self._release(sums, step)
        if self.clipping.mode == "quantile":
            deviation = count_noise(self.clipping, self.noise_multiplier)
            noise = deviation * self.stream.normal(_VOTES, step, ())
            released = discretised(torch.tensor(votes, dtype=torch.float64), noise, grid_of(1, 1))
            self.bound = moved(self.clipping, self.bound, float(released), self.expected_batch_size)

    def _release(self, sums: Mapping[str, Tensor], step: int) -> None:
        """Fill ``p.grad`` with noised sums; from here on nothing is private."""
        scale = gradient_noise(self.clipping, self.noise_multiplier) * self.bound * MARGIN
        grid = grid_of(self.bound, sum(total.numel() for total in sums.values()))
        for name, parameter in self.params.items():
            noise = self.stream.normal(name, step, parameter.shape).to(parameter.device)
            released = discretised(sums[name], scale * noise, grid) / self.expected_batch_size
            if name in self.mask:
                released = released * self.mask[name]
            parameter.grad = released.to(parameter.dtype)

    def _measured(self, part: Any, losses_fn: Losses[Any]) -> Gradients:
        """Return the masked gradients of whatever is clipped as one, in the order of ``params``."""
        assert self._engine is not None
        batch = part.batch if isinstance(part, OfUnits) else part
        samples = self._engine.gradients(batch, losses_fn, check=not self._checked)
        self._checked = True
        for name in samples.keys() & self.mask.keys():
            samples[name] = Dense(samples[name].dense() * self.mask[name])
        if isinstance(part, OfUnits):
            samples = {name: of_units(sample, part.sizes) for name, sample in samples.items()}
        return samples


def private_gradient(
    assignment: Assignment,
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    mask: Tensors,
    stream: NoiseStream,
    engine: str = "taps",
) -> PrivateGradient:
    """Return what makes the gradients of a private assignment's steps; what an audit attacks too.

    Args:
        assignment: with privacy.
        model: the whole task model.
        params: all that it trains.
        mask: 0/1 by name.
        stream: of the client's secret.
        engine: see :class:`PrivateGradient`.
    """
    assert assignment.privacy is not None
    return PrivateGradient(
        model,
        params,
        bound=assignment.privacy.max_grad_norm,
        noise_multiplier=assignment.privacy.noise_multiplier,
        # a client declared smaller than a batch is sampled whole, at rate 1
        expected_batch_size=min(assignment.batch_size, assignment.num_examples),
        stream=stream,
        mask=mask,
        clipping=assignment.privacy.clipping,
        engine=engine,
    )


_VOTES = "the votes on the bound"  # no tensor's name
