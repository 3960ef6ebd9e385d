"""One batch to ``p.grad``: plain, or DP-SGD (1607.00133) over per-example gradients.

An engine (:mod:`clients.per_example`) measures each example's gradient in the one backward pass of
its microbatch; masking, clipping, summing and noise are done here, so that noise comes from the
client's cryptographic stream, a mask counts before the clip, and microbatches bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from clients.assignment import Clipping
from clients.clipping import Clip, count_noise, gradient_noise, moved
from clients.noise import MARGIN, NoiseStream, discretised, grid_of
from clients.per_example import measuring
from clients.samples import Dense, Engine, Gradients, NoPerExampleGradient
from strategies.base import Tensors

__all__ = ["NoPerExampleGradient", "PrivateGradient", "plain_step", "verify_per_example"]

Batch = TypeVar("Batch")
Losses = Callable[[Batch], Tensor]
"""Returns ``[batch]`` losses with their graph: one value an example, not one for the batch."""


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
            NoPerExampleGradient: if the model mixes examples, no engine serves a layer, or the
                model's trainable parameters are not exactly ``params``.
        """
        self._checked = False
        self._engine = self._open.enter_context(measuring(self.model, self.params))
        return self

    def __exit__(self, *error: object) -> None:
        self._engine = None
        self._open.close()

    def step(self, microbatches: Iterable[Batch], losses_fn: Losses[Batch], step: int) -> None:
        """Fill ``p.grad`` with ``(sum of clipped gradients + noise) / expected_batch_size``.

        The split into microbatches does not matter; none at all (an empty Poisson sample) gives
        noise alone. Nothing else about the examples is returned or kept.

        Args:
            microbatches: the sampled examples in parts, none of them empty.
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
        for batch in microbatches:
            samples = self._measured(losses_fn(batch))
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

    def _measured(self, losses: Tensor) -> Gradients:
        """Return the masked gradients of a microbatch's examples, in the order of ``params``."""
        assert self._engine is not None
        samples = self._engine.gradients(losses, check=not self._checked)
        self._checked = True
        for name in samples.keys() & self.mask.keys():
            samples[name] = Dense(samples[name].dense() * self.mask[name])
        return samples


def verify_per_example(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    batch: Batch,
    singles: Sequence[Batch],
    losses_fn: Losses[Batch],
) -> None:
    """Compare the measured per-example gradients with a loop over batches of one.

    Dropout is off meanwhile; ``p.grad`` and the model's modes are as before afterwards. As costly
    as ``len(singles)`` steps of one example: meant for a start-up check on two or three.

    Args:
        model: the whole task model.
        params: all of its trainable parameters.
        batch: some examples.
        singles: the same examples in the same order, one a batch.
        losses_fn: forward pass.

    Raises:
        NoPerExampleGradient: naming the first parameter whose gradients differ by more than 1e-4
            of their norm.
    """
    before = {name: p.grad for name, p in params.items()}
    try:
        with _deterministic(model):
            with measuring(model, params) as engine:
                found = engine.gradients(losses_fn(batch), check=False)
                measured = {name: samples.dense() for name, samples in found.items()}
            for index, single in enumerate(singles):
                plain_step(params, [single], losses_fn, 1)
                for name, p in params.items():
                    assert p.grad is not None
                    _compare(name, measured[name][index], p.grad)
    finally:
        for name, p in params.items():
            p.grad = before[name]


_VOTES = "the votes on the bound"  # no tensor's name


def _compare(name: str, measured: Tensor, reference: Tensor) -> None:
    error, size = (measured - reference).norm(), reference.norm()
    if error > 1e-4 * size + 1e-7:
        raise NoPerExampleGradient(
            f"{name}: the measured gradient of one example is {float(error / size):.2g} (relative) "
            "away from its true gradient; this adapter cannot be trained with DP-SGD"
        )


@contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, but leave trainable layers in train mode: Opacus skips others."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = any(p.requires_grad for p in module.parameters(recurse=False))
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
