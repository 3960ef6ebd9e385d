"""Trimmed mean: entry by entry, the mean without the lowest and highest values.

Source: arXiv 1803.01498 (algorithm 1, option II).
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
class TrimmedMean(RobustRule):
    """Each entry is averaged without its extremes; withstands a hostile minority.

    Clients count alike. It depends on the basis that the trained factor is written in, as no rule
    on products does.

    Attributes:
        inner: a strategy in which clients share one factor of each product.
        hostile: how many hostile clients a round must withstand, >= 0: so many of the lowest and
            of the highest values of each entry are left out. It needs ``2 hostile + 1`` updates;
            0 is the unweighted mean.
    """

    hostile: Annotated[int, Range(0)] = 1

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "hostile": 0}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        refuse_other_gauges(self.inner, "trimmed-mean")
        refuse_inner_needs(self.inner, 1)

    @property
    def needs(self) -> Needs:
        """Something must be left: 2b < n."""
        return Needs(2 * self.hostile + 1)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the trimmed mean as one update."""
        return [middle_mean(adapter, updates, self.hostile)], {}
