"""The client's half of control variates (SCAFFOLD, 1910.06378): corrections, and what is kept.

The broadcast holds the server's variate, the client keeps its own; both are displacements: a
variate times the learning rate and the number of steps of a round. See ``strategies/scaffold.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clients.assignment import Assignment
from clients.optimizers.descent import PlainDescent
from strategies.base import CORRECTION, Tensors, corrections


class NoGradientEstimate(ValueError):
    """What a round moved is no sum of gradients, so that no variate can be learnt from it."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What one client adds to the gradient of every step of one round; empty for nothing.

    It is made of released values alone, so that under DP it may be added after the noise.

    Attributes:
        server: the server's variate, by tensor name.
        own: the client's, of its last round.
        reach: learning rate times steps, > 0.
    """

    server: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)
    reach: float = 1.0

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        params: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        kept: Tensors,
    ) -> Correction:
        """Return what an assignment asks for.

        Args:
            assignment: its broadcast holds the server's variate, if the round has one.
            params: what the round trains.
            optimizer: of ``params``.
            kept: what the client kept of earlier rounds.

        Raises:
            NoGradientEstimate: if a displacement under ``optimizer`` is no sum of gradients, or
                the number of steps is not fixed.
        """
        sent = corrections(assignment.broadcast.extra)
        if not sent:
            return cls()
        if not isinstance(optimizer, PlainDescent) or assignment.steps is None:
            raise NoGradientEstimate(
                "the round corrects gradients, and what its steps move is no sum of gradients; "
                "use optimizer sgd without momentum or weight decay, and a number of steps"
            )
        own, device = corrections(kept), assignment.device
        reach = optimizer.param_groups[0]["lr"] * assignment.steps
        names = sorted(sent.keys() & params.keys())
        return cls(
            {n: sent[n].to(device) for n in names},
            {n: own.get(n, torch.zeros_like(sent[n])).to(device) for n in names},
            reach,
        )

    def add(self, params: Mapping[str, nn.Parameter]) -> None:
        """Add ``c - c_k`` to the gradients."""
        for name, ours in self.own.items():
            parameter = params[name]
            step = ((self.server[name] - ours) / self.reach).to(parameter.dtype)
            parameter.grad = step if parameter.grad is None else parameter.grad + step

    def after(self, before: Tensors, trained: Tensors) -> dict[str, Tensor]:
        """Return what the client keeps of the round: ``C_k - C + (x - y)``.

        Args:
            before: the values that training began with.
            trained: those that it ended with.
        """
        kept = {}
        for name, ours in self.own.items():
            moved = (before[name].double() - trained[name].to(before[name].device).double()).to(
                ours.dtype
            )
            kept[CORRECTION + name] = (ours - self.server[name] + moved).cpu()
        return kept
