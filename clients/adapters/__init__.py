"""Adapters: how a few tensors change a frozen model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from strategies.plugins import Family

if TYPE_CHECKING:  # a config only asks which plug-ins there are
    from torch import Tensor, nn

    from clients.initialisations import InitInputs
    from strategies.base import Tensors

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

        ``low-rank``: its delta is exactly ``scaling * B @ A`` of what :meth:`factored` returns, so
        it can be stacked and merged; ``low-rank-and-shifts``: its delta is that and the changes of
        whole parameters (:mod:`clients.shifts`), so that it can be merged; ``merge``: it can be
        folded into the base weights;
        ``dp-taps``, ``dp-hooks``, ``dp-vmap`` or ``dp-alone``: the first engine of
        :mod:`clients.per_example` that gives its exact per-example gradients, whichever of its
        tensors train; without any it is refused under DP;
        ``causal-only``: it is for ``causal-lm`` alone; ``unquantised-base``: it needs a base model
        that is not quantised, and refuses to be attached to another; ``trains-a``: where it differs
        from LoRA is in how A trains, so that it is nothing new under a frozen A. And of how it
        starts, see :class:`clients.initialisations.Init`.
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

    def initialise(self, model: nn.Module, inputs: InitInputs) -> Tensors:
        """Give a freshly attached adapter the first tensors that are not drawn; once in a run.

        Returns:
            The offset: a low-rank adapter's tensors that belong frozen underneath from now on,
            because the adapter starts with what they take out of the base; mostly none.
        """
        ...

    def factored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the delta of ``tensors`` as plain ``lora_A``, ``lora_B`` and ``scaling``.

        Tensors that are plain factors, or of an adapter that is not ``low-rank``, stay as they are.
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

    def refuse_batch(self, model: nn.Module, input_ids: Tensor) -> None:
        """Raise a ValueError if this batch, ``[batch, length]``, cannot teach the adapter anything.

        Asked before each step, but never where nobody may learn that: under privacy.
        """
        ...

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the live parameters behind :meth:`read`, by the same names, scalings excepted."""
        ...
