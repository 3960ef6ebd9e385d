"""Multi-Krum: the mean of the updates whose nearest neighbours are nearest.

Source: arXiv 1703.02757 (section 4). Distances are between changes of the products, not of factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import Needs, Tensors, Update
from strategies.geometry import closeness, gram
from strategies.plugins import Range
from strategies.robust import Counting, RobustRule, counted, refuse_inner_needs, told


@dataclass(frozen=True)
class MultiKrum(RobustRule):
    """The updates that lie closest to their neighbours are averaged; withstands hostile clients.

    Scores are Krum's; the ``keep`` lowest are handed to the inner strategy.

    Attributes:
        inner: the strategy that aggregates what is chosen.
        hostile: how many hostile clients a round must withstand, >= 0; it needs
            ``2 hostile + 3`` updates.
        keep: how many updates to use, >= 1; null for as many as the condition allows,
            ``n - hostile - 2``. Given, a round needs ``keep + hostile + 2`` updates.
        weighting: ``uniform`` counts the chosen clients alike, ``examples`` by what they say.
        head: whether the head counts in distances too.
    """

    hostile: Annotated[int, Range(0)] = 1
    keep: Annotated[int | None, Range(1)] = None
    weighting: Counting = "uniform"
    head: bool = True

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "hostile": 0}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        refuse_inner_needs(self.inner, self.keep or self.hostile + 1)

    @property
    def needs(self) -> Needs:
        """The paper's conditions, n >= 2f + 3 and m <= n - f - 2."""
        return Needs(max(2 * self.hostile + 3, (self.keep or 0) + self.hostile + 2))

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the updates of the lowest scores, by client."""
        order = closeness(gram(adapter, updates, self.head), self.hostile)
        kept = sorted(order[: self.keep or len(updates) - self.hostile - 2])
        others = [u.client for i, u in enumerate(updates) if i not in kept]
        return counted([updates[i] for i in kept], self.weighting), told(others)
