"""One batch to ``p.grad``: plain, or DP-SGD (1607.00133) over per-example gradients.

Opacus' hooks measure each example's gradient; clipping, summing and noise are done here, so that
noise comes from the client's cryptographic stream, a mask counts before the clip, and microbatches
bound the memory. What the hooks measure is checked rather than believed: adapters exist for which
they measure nothing, or something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from clients.noise import NoiseStream
from strategies.base import Tensors

Batch = TypeVar("Batch")
Losses = Callable[[Batch], Tensor]
"""Returns ``[batch]`` losses with their graph: one value an example, not one for the batch."""

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
_ROUNDING = 1 + 1e-6  # a clipped gradient may not exceed its bound by float32 rounding either


class NoPerExampleGradient(RuntimeError):
    """A parameter's per-example gradients cannot be measured, so DP-SGD is not possible."""


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

    A context: entering adds hooks to the model, leaving removes them and every trace of them, so
    that the model can be used again, privately or not.

    Attributes:
        model: the whole task model, in train mode.
        params: all of its trainable parameters, by the names that noise and mask go by.
        max_grad_norm: C, the bound on the norm of one example's gradient over all parameters, > 0.
        noise_multiplier: sigma; noise of standard deviation sigma * C is added to the sum, >= 0.
        expected_batch_size: sampling rate times data set size, > 0. The divisor; the number of
            examples that were drawn must not be, it is private.
        stream: where the noise comes from.
        mask: 0/1 tensors by name; entries at 0 are left out before clipping and get no noise.

    Raises:
        ValueError: if a number is out of range.
    """

    model: nn.Module
    params: Mapping[str, nn.Parameter]
    max_grad_norm: float
    noise_multiplier: float
    expected_batch_size: float
    stream: NoiseStream
    mask: Tensors = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _checked: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "expected_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be >= 0, got {self.noise_multiplier}")

    def __enter__(self) -> PrivateGradient:
        """Add the hooks.

        Raises:
            NoPerExampleGradient: if the model mixes examples, a layer cannot be hooked, or the
                model's trainable parameters are not exactly ``params``.
        """
        self._checked = False
        self._open.enter_context(_hooked(self.model, self.params))
        return self

    def __exit__(self, *error: object) -> None:
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
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.params.items()}
        for batch in microbatches:
            self._add_clipped(sums, losses_fn(batch))
        for name, parameter in self.params.items():
            noise = self.stream.normal(name, step, parameter.shape).to(parameter.device)
            scale = self.noise_multiplier * self.max_grad_norm
            # In float64 until the last line: see NoiseStream.normal.
            released = (sums[name].double() + scale * noise) / self.expected_batch_size
            if name in self.mask:
                released = released * self.mask[name]
            parameter.grad = released.to(parameter.dtype)

    def _add_clipped(self, sums: Mapping[str, Tensor], losses: Tensor) -> None:
        """Add the clipped gradients of a microbatch's examples to ``sums``, in place."""
        samples = _per_example_gradients(self.params, losses, check_sums=not self._checked)
        self._checked = True
        for name in samples.keys() & self.mask.keys():
            samples[name] *= self.mask[name]
        norms = torch.stack(
            [
                torch.linalg.vector_norm(s.flatten(1), dim=1, dtype=torch.float32)
                for s in samples.values()
            ]
        ).norm(dim=0)
        factors = (self.max_grad_norm / (norms * _ROUNDING)).clamp(max=1)
        lost = ~norms.isfinite()  # an overflowing example counts as zero: its influence is bounded
        if lost.any():
            factors[lost] = 0
            for sample in samples.values():
                sample[lost] = 0
        for name, sample in samples.items():
            sums[name].add_(torch.tensordot(factors.to(sample.dtype), sample, dims=1))


def verify_per_example(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    batch: Batch,
    singles: Sequence[Batch],
    losses_fn: Losses[Batch],
) -> None:
    """Compare the hooks' per-example gradients with a loop over batches of one.

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
            with _hooked(model, params):
                measured = _per_example_gradients(params, losses_fn(batch), check_sums=False)
            for index, single in enumerate(singles):
                plain_step(params, [single], losses_fn, 1)
                for name, p in params.items():
                    assert p.grad is not None
                    _compare(name, measured[name][index], p.grad)
    finally:
        for name, p in params.items():
            p.grad = before[name]


def _compare(name: str, measured: Tensor, reference: Tensor) -> None:
    error, size = (measured - reference).norm(), reference.norm()
    if error > 1e-4 * size + 1e-7:
        raise NoPerExampleGradient(
            f"{name}: the measured gradient of one example is {float(error / size):.2g} (relative) "
            "away from its true gradient; this adapter cannot be trained with DP-SGD"
        )


def _per_example_gradients(
    params: Mapping[str, nn.Parameter], losses: Tensor, *, check_sums: bool
) -> dict[str, Tensor]:
    """Return ``[batch, *shape]`` gradients by name, and leave no gradient at the parameters.

    With ``check_sums``, they must add up to what autograd gives for the sum of the losses: true in
    any mode, dropout and checkpointing included, and false for a wrong rule or a hidden path.
    """
    if losses.dim() != 1:
        raise NoPerExampleGradient(
            f"losses must be one per example, [batch], got shape {list(losses.shape)}"
        )
    try:
        with warnings.catch_warnings():
            # The first trainable layer's input needs no gradient, and its hook does not use one.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            torch.autograd.backward(losses.sum())
        samples = {n: _sample(n, p, len(losses)) for n, p in params.items()}
        if check_sums:
            for name, p in params.items():
                _check_sum(name, samples[name], p.grad)
        return samples
    except (ValueError, AttributeError, TypeError, IndexError, NotImplementedError) as error:
        raise NoPerExampleGradient(
            f"per-example gradients failed: {error}. The model must be in train mode, and gradient "
            "checkpointing must be reentrant"
        ) from error
    finally:
        for p in params.values():
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]  # Opacus' attribute


def _sample(name: str, parameter: nn.Parameter, batch: int) -> Tensor:
    sample = getattr(parameter, "grad_sample", None)
    expected = (batch, *parameter.shape)
    found = tuple(sample.shape) if isinstance(sample, Tensor) else None
    if not isinstance(sample, Tensor) or found != expected:
        raise NoPerExampleGradient(
            f"{name}: per-example gradients must be {list(expected)}, got "
            f"{list(found) if found else 'none'}; this adapter cannot be trained with DP-SGD, or "
            "gradient checkpointing is not reentrant"
        )
    return sample


def _check_sum(name: str, sample: Tensor, gradient: Tensor | None) -> None:
    total = torch.zeros_like(sample[0]) if gradient is None else gradient
    error = (sample.sum(0) - total).norm()
    if error > _CONSERVATION * sample.flatten(1).norm(dim=1).sum() + 1e-7:
        raise NoPerExampleGradient(
            f"{name}: the examples' gradients do not add up to the batch's; this adapter or model "
            "cannot be trained with DP-SGD"
        )


@contextmanager
def _hooked(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Measure per-example gradients of ``params`` inside; leave no trace outside."""
    from opacus.grad_sample import GradSampleHooks  # takes two seconds; training without DP is free

    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    given = {id(p) for p in params.values()}
    if given != trainable.keys():
        # Anything trainable that is not in params would be trained without clip and noise.
        extra = [name for key, name in trainable.items() if key not in given]
        missing = [name for name, p in params.items() if id(p) not in trainable]
        raise NoPerExampleGradient(
            f"the model's trainable parameters must be those given; only the model trains {extra}, "
            f"only given {missing}"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise NoPerExampleGradient(
                f"{name} is a batch norm, which mixes the examples of a batch; put it in eval mode"
            )
    hooked = [m for m in model.modules() if _trains(m)]
    try:
        try:
            GradSampleHooks(model, loss_reduction="sum", strict=True)
        except (NotImplementedError, ValueError) as error:
            raise NoPerExampleGradient(f"a trainable layer cannot be hooked: {error}") from error
        yield
    finally:
        # Not by Opacus' own cleanup, which forgets attributes and needs its constructor's success.
        for handle in getattr(model, "autograd_grad_sample_hooks", ()):
            handle.remove()
        _forget([model, *hooked, *model.parameters()])


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _forget(holders: Iterable[nn.Module | nn.Parameter]) -> None:
    """Remove all attributes that Opacus leaves."""
    for holder in holders:
        for name in _HOOK_LEFTOVERS & vars(holder).keys():
            delattr(holder, name)


@contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, but leave trainable layers in train mode: Opacus skips others."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = _trains(module)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
