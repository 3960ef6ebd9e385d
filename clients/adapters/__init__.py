"""Adapters: how a few tensors change a frozen model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from strategies.base import Tensors
from strategies.plugins import Family

ADAPTERS = Family("adapter", "clients.adapters")


class Adapter(Protocol):
    """One adapter method, configured.

    Tensor names are the backbone's module names, without any prefix of PEFT's:
    ``encoder.layer.0.attention.self.query.lora_A.weight``. Every low-rank layer carries its
    scaling as a 0-d tensor ``encoder.layer.0.attention.self.query.scaling``.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """What is true of the method, proven by its contract test.

        ``low-rank``: its delta is exactly ``scaling * B @ A``, so it can be stacked, merged and
        refactored; ``merge``: it can be folded into the base weights; ``dp-hooks``: Opacus' hooks
        give its exact per-example gradients; ``causal-only``: it is for ``causal-lm`` alone.
        """
        ...

    @property
    def frozen(self) -> str:
        """Regular expression (``re.fullmatch``) of tensor names that never train, empty for none.

        No round trains or returns them, whatever the strategy says; a strategy that would change
        them is refused.
        """
        ...

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Return ``backbone`` with a trainable adapter, on top of a frozen ``underlay`` if any.

        The adapter's own random numbers come from torch's global generator: seed it before.
        """
        ...

    def initialise(self, model: nn.Module) -> None:
        """Give the attached adapter the first tensors that follow from the base weights, if any.

        Called once, before round 1: every other attachment is followed by :meth:`write`.
        """
        ...

    def detach(self, model: nn.Module) -> nn.Module:
        """Return the backbone as it was: base weights bit-identical."""
        ...

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the adapter's tensors, on the CPU."""
        ...

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` (all that :meth:`read` returns, head excepted) into the adapter."""
        ...

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a scalar to add to the loss, from parameters alone, or None.

        It sees no data: its gradient is added after DP's noise.
        """
        ...

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the live parameters behind :meth:`read`, by the same names, scalings excepted."""
        ...
