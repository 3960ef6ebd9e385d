"""Coordinate-wise median: what most clients do, entry by entry.

Source: arXiv 1803.01498 (algorithm 1, option I).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import Needs, Tensors, Update
from strategies.plugins import Range
from strategies.robust import (
    RobustRule,
    middle_mean,
    refuse_inner_needs,
    refuse_other_gauges,
)


@dataclass(frozen=True)
class Median(RobustRule):
    """Each entry becomes the median of the clients' values; withstands a hostile minority.

    Of an even number it is the mean of the middle two. Clients count alike. It depends on the basis
    that the trained factor is written in, as no rule on products does.

    Attributes:
        inner: a strategy in which clients share one factor of each product.
        hostile: how many hostile clients a round must withstand, >= 0; it needs
            ``2 hostile + 1`` updates.
    """

    hostile: Annotated[int, Range(0)] = 1

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "hostile": 0}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        refuse_other_gauges(self.inner, "median")
        refuse_inner_needs(self.inner, 1)

    @property
    def needs(self) -> Needs:
        """A minority of hostile clients: n > 2f."""
        return Needs(2 * self.hostile + 1)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the median as one update."""
        return [middle_mean(adapter, updates, (len(updates) - 1) // 2)], {}
