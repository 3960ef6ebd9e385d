"""Every example's own gradient of one parameter, and what is asked of whatever measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Losses: TypeAlias = Callable[[Batch], Tensor]
"""Returns ``[batch]`` losses with their graph: one value an example, not one for the batch."""


class NoPerExampleGradient(RuntimeError):
    """A parameter's per-example gradients cannot be measured, so DP-SGD is not possible."""


class Samples(Protocol):
    """One parameter's gradient for each example of a batch, in whatever form is the smaller."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def dense(self) -> Tensor:
        """Return the gradients, ``[batch, *shape]``."""
        ...

    def norms(self) -> Tensor:
        """Return their norms, float32 ``[batch]``."""
        ...

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients times ``factors`` ``[batch]``; 0 times NaN is 0."""
        ...


Gradients: TypeAlias = dict[str, Samples]
"""Per-example gradients by the parameter's name."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Gradients that are there.

    Attributes:
        gradients: ``[batch, *shape]``.
    """

    gradients: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.gradients)

    def dense(self) -> Tensor:
        """Return the gradients, ``[batch, *shape]``."""
        return self.gradients

    def norms(self) -> Tensor:
        """Return their norms, float32 ``[batch]``."""
        flat = self.gradients.flatten(1)
        found: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
        return found

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients times ``factors`` ``[batch]``; 0 times NaN is 0."""
        kept = _without(self.gradients, factors == 0)
        found: Tensor = torch.tensordot(factors.to(kept.dtype), kept, dims=1)
        return found


@dataclass(frozen=True, slots=True)
class Factored:
    """Gradients of a linear layer's weight that are never formed: ghost norms (2110.05679).

    Attributes:
        inputs: a, ``[batch, positions, in]``.
        outputs: g, the gradients of the layer's outputs, ``[batch, positions, out]``.
    """

    inputs: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs)

    def dense(self) -> Tensor:
        """Return the gradients, ``[batch, out, in]``."""
        return outer(self.outputs, self.inputs)

    def norms(self) -> Tensor:
        """Return their norms, from the Gram matrices of a and g: O(positions² (in + out)).

        In float64: where positions cancel, a norm that is rounded down would not bound anything.
        """
        a, g = self.inputs.double(), self.outputs.double()
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).clamp(min=0).sqrt().float()

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients times ``factors`` ``[batch]``; 0 times NaN is 0."""
        lost = factors == 0
        a, g = _without(self.inputs, lost), _without(self.outputs, lost)
        return (g * factors.to(g.dtype)[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)


class Engine(Protocol):
    """Measures gradients of the losses of one batch after the other."""

    def gradients(self, batch: Any, losses_fn: Losses[Any], *, check: bool) -> Gradients:
        """Return every parameter's gradients of the losses of ``batch``, an example each.

        No gradient is left at the parameters. With ``check``, what only costs time to find out
        again is looked at too.

        Raises:
            NoPerExampleGradient: if a parameter has none, or they are not all of its gradient.
        """
        ...


def singles(batch: Batch) -> list[Batch]:
    """Return the examples of a batch, each as a batch of one; views of its memory.

    Args:
        batch: a tensor ``[batch, ...]``, or a tuple, mapping or dataclass of nothing but batches;
            a dataclass's empty mapping is in each of its parts.
    """
    if isinstance(batch, Tensor):
        return list(torch.split(batch, 1))  # type: ignore[arg-type]
    if isinstance(batch, tuple):
        return list(zip(*map(singles, batch), strict=True))  # type: ignore[arg-type]
    if isinstance(batch, Mapping):
        each = zip(*map(singles, batch.values()), strict=True)
        return [dict(zip(batch, values, strict=True)) for values in each]  # type: ignore[misc]
    if not is_dataclass(batch) or isinstance(batch, type):
        raise TypeError(
            f"a batch is tensors, in a tuple, mapping or dataclass, got {type(batch).__name__}"
        )
    own = {f.name: getattr(batch, f.name) for f in fields(batch)}
    names = [name for name, part in own.items() if not isinstance(part, Mapping) or part]
    parts = zip(*(singles(own[name]) for name in names), strict=True)
    return [replace(batch, **dict(zip(names, values, strict=True))) for values in parts]


def outer(g: Tensor, a: Tensor) -> Tensor:
    """Return ``gᵀ a`` ``[batch, out, in]``: the narrow factor first is up to six times faster."""
    return g.mT @ a if g.shape[-1] <= a.shape[-1] else (a.mT @ g).mT


def _without(values: Tensor, lost: Tensor) -> Tensor:
    """Return ``values`` ``[batch, ...]`` with zeros where ``lost``; themselves where none is."""
    if not lost.any():
        return values
    return values.masked_fill(lost.view(-1, *[1] * (values.dim() - 1)), 0)


def refuse_mixed(losses: Tensor) -> None:
    """Refuse losses that are not one per example.

    Raises:
        NoPerExampleGradient: with the number of their dimensions; sizes tell about the data.
    """
    if losses.dim() != 1:
        raise NoPerExampleGradient(
            f"losses must be one per example, [batch], got {losses.dim()} dimensions"
        )


def missing(name: str, shape: Sequence[int], found: Sequence[int] | None) -> NoPerExampleGradient:
    """Return the error of a parameter whose gradients are not one an example, or are not there.

    How many examples there are is private.

    Args:
        name: the parameter's.
        shape: the parameter's.
        found: what there is in place of ``[batch, *shape]``, None for nothing.
    """
    problem = "there are none" if found is None else "there is another number or shape of them"
    return NoPerExampleGradient(
        f"{name}: gradients must be one of {list(shape)} an example, and {problem}; this adapter "
        "cannot be trained with DP-SGD"
    )
