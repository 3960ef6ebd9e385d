"""The client's half of a budget of ranks: after a probe, only the ranks of most effect train on.

See ``strategies/selection.py`` for what is chosen, and how it travels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clients.assignment import Assignment
from strategies.base import Tensors
from strategies.selection import budget_of, chosen, num_ranks


class NotPrivate(ValueError):
    """Which ranks a client chooses depends on its data, and nothing hides that."""


@dataclass(frozen=True, slots=True)
class Selection:
    """When a client chooses, and how many ranks.

    Attributes:
        sent: the adapter as it was sent.
        ranks: how many, of all layers together.
        after: after how many steps; 0 for never.
    """

    sent: Tensors
    ranks: int = 0
    after: int = 0

    @classmethod
    def of(cls, assignment: Assignment, num_steps: int) -> Selection:
        """Return what an assignment asks for; a budget of all ranks asks for nothing.

        Args:
            assignment: its broadcast holds the budget, if the round has one.
            num_steps: of the round, >= 1.

        Raises:
            NotPrivate: if the assignment is private.
        """
        sent = assignment.broadcast
        budget = budget_of(sent.extra)
        if budget is None:
            return cls(sent.tensors)
        if assignment.private:
            raise NotPrivate(
                "which ranks a client chooses depends on its data, which privacy does not cover; "
                "use rolora, or run without privacy"
            )
        if budget.ranks >= num_ranks(sent.tensors):
            return cls(sent.tensors)
        return cls(sent.tensors, budget.ranks, max(1, math.ceil(budget.probe * num_steps)))

    def at(self, step: int, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the chosen ranks by factor, once their step has come; nothing at any other.

        Args:
            step: how many are done.
            trained: the live parameters.
        """
        if step != self.after:
            return {}
        now = {name: tensor.detach().cpu() for name, tensor in trained.items()}
        return chosen(self.sent, now, self.ranks)
