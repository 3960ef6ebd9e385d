"""Krum: the one update whose nearest neighbours are nearest.

Source: arXiv 1703.02757 (section 4). Distances are between changes of the products, not of factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import Needs, Tensors, Update
from strategies.geometry import closeness, gram
from strategies.plugins import Range
from strategies.robust import RobustRule, counted, refuse_inner_needs, told


@dataclass(frozen=True)
class Krum(RobustRule):
    """Only the update that lies closest to its neighbours is used; withstands hostile clients.

    A client's score is the sum of its squared distances to the ``n - hostile - 2`` clients nearest
    to it, and the lowest is chosen; of equals, the first by name. So a round learns from one client
    only. With data that differ much between clients, honest outliers are left out too.

    Attributes:
        inner: the strategy that aggregates what is chosen.
        hostile: how many hostile clients a round must withstand, >= 0; it needs
            ``2 hostile + 3`` updates.
        head: whether the head counts in distances too.
    """

    hostile: Annotated[int, Range(0)] = 1
    head: bool = True

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "hostile": 0}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        refuse_inner_needs(self.inner, 1)

    @property
    def needs(self) -> Needs:
        """The paper's condition, n >= 2f + 3."""
        return Needs(2 * self.hostile + 3)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the update of the lowest score."""
        chosen = closeness(gram(adapter, updates, self.head), self.hostile)[0]
        others = [u.client for i, u in enumerate(updates) if i != chosen]
        return counted([updates[chosen]], "uniform"), told(others)
