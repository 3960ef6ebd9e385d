"""What robust rules on single coordinates share: each entry by itself, without its extremes.

Source: arXiv 1803.01498. They depend on the basis that the trained factor is written in, as no rule
on products does, so that clients must share it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from strategies.base import Needs, Tensors, Update
from strategies.plugins import Range
from strategies.robust import RobustRule, refuse_inner_needs


@dataclass(frozen=True)
class CoordinateRule(RobustRule):
    """A rule that hands on one update, whose entries are means of the clients' middle values.

    Attributes:
        inner: a strategy in which clients share one factor of each product.
        hostile: how many hostile clients a round must withstand, >= 0.
    """

    hostile: Annotated[int, Range(0)] = 1

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "hostile": 0}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        if "shared-gauge" not in self.inner.capabilities:
            raise ValueError(
                "it compares single coordinates, and with this inner strategy clients train both "
                "factors: (B G^-1)(G A) is the same model as B A for every invertible G, so that "
                "their coordinates mean nothing to each other; wrap ffa-lora or fedsvd, or use "
                "krum or geometric-median, which compare products"
            )
        refuse_inner_needs(self.inner, 1)

    @property
    def needs(self) -> Needs:
        """A minority of hostile clients, so that something honest is left: n > 2f."""
        return Needs(2 * self.hostile + 1)

    @abstractmethod
    def dropped(self, num_updates: int) -> int:
        """Return how many of the lowest and of the highest values of an entry are left out."""

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return one update for all."""
        return [_middle_mean(adapter, updates, self.dropped(len(updates)))], {}


def _middle_mean(adapter: Tensors, updates: Sequence[Update], drop: int) -> Update:
    """Return one update: per coordinate the mean of what is left without the extremes.

    Args:
        adapter: gives the result's dtypes.
        updates: n of them.
        drop: how many of the lowest and of the highest values to leave out, 2 drop < n.
    """
    tensors = {}
    for name in sorted(updates[0].tensors):
        values = torch.stack([update.tensors[name] for update in updates]).sort(dim=0).values
        middle = values[drop : len(updates) - drop].to(torch.float64)
        tensors[name] = middle.mean(dim=0).to(adapter[name].dtype)
    return replace(updates[0], client="", tensors=tensors, num_examples=1, metrics={}, weight=1.0)
