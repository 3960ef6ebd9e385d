"""Regularizers: what a method cannot see, it cannot leak.

The argument lists are the privacy contract. Only ``example_loss`` and ``consolidate_from_data``
see data; the first is clipped and noised with the loss, the second is refused under DP. Everything
else is a function of released values, and free.

``memory`` is plain tensors by the plug-in's own names; the caller keeps them namespaced
(``o-lora/NAME``) with :func:`recall` and :func:`namespaced`, and versions them beside the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.plugins import Family

if TYPE_CHECKING:  # a config only asks which plug-ins there are
    from torch import Tensor, nn

    from strategies.base import Tensors

REGULARIZERS = Family("regularizer", "clients.regularizers")


class Regularizer:
    """A method that shapes local training. Every hook does nothing by default.

    Attributes:
        acts_on: regular expression (``re.fullmatch``) of tensor names; a run that trains none of
            them is refused, because the method would do nothing.
        freezes: regular expression of tensor names that this method needs frozen, or empty; a run
            that trains one of them is refused.
        starts: how a task of a stream starts from the one before, unless the stream's file says:
            ``continue``, ``stack`` or ``fresh``.
    """

    acts_on: ClassVar[str] = ".*"
    freezes: str = ""
    starts: ClassVar[str] = "continue"

    def initialise(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the adapter's first tensors, changed before round 1. Parameters only: free."""
        return adapter

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return a scalar to add to the loss. No data: its gradient is added after the noise.

        Args:
            params: what is trained.
            reference: all that the round began with, scalings and what is frozen included.
            memory: of earlier tasks.
        """
        return None

    def example_loss(
        self, model: nn.Module, batch: Any, outputs: Tensor, memory: Tensors
    ) -> Tensor | None:
        """Return ``[batch]`` values to add to the examples' losses; clipped with them."""
        return None

    def project(self, grads: Tensors, memory: Tensors) -> Tensors:
        """Return changed gradients, after clipping and noise."""
        return grads

    def observe(self, grads: Tensors, before: Tensors, after: Tensors, memory: Tensors) -> Tensors:
        """Return the memory after an optimizer step on released gradients."""
        return memory

    def consolidate(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return the memory after a task, from the final adapter alone."""
        return memory

    def consolidate_from_data(
        self, model: nn.Module, batches: Iterable[Any], memory: Tensors
    ) -> Tensors:
        """Return the memory after a task, from data. Refused under DP if overridden."""
        return memory


def recall(memory: Tensors, name: str) -> dict[str, Tensor]:
    """Return the part of ``memory`` that belongs to plug-in ``name``, by its own names."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}


def namespaced(memory: Tensors, name: str) -> dict[str, Tensor]:
    """Return a plug-in's ``memory`` under the names by which it is kept."""
    return {f"{name}/{k}": v for k, v in memory.items()}
