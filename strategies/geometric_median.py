"""Geometric median (RFA): the point whose distances to the clients' changes sum up to the least.

Source: arXiv 1912.13445 (the smoothed Weiszfeld algorithm). The paper stops after a few steps,
because there each is a round of secure averaging. Here a step costs O(n²), as the median is a
weighted mean of the changes and all it takes is their inner products: so it goes on until it
stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import Needs, Tensors, Update
from strategies.geometry import gram
from strategies.plugins import Range
from strategies.robust import Counting, RobustRule, counted, finite, needs_with, told, weighed

_STILL = 1e-12  # relative change of the weights


@dataclass(frozen=True)
class GeometricMedian(RobustRule):
    """Updates are weighed by the inverse of their distance to the geometric median of the changes.

    The inner strategy aggregates the updates with these weights: exactly the geometric median of
    the products where it is exact, else as near as it comes to a weighted mean.

    Attributes:
        inner: the strategy that aggregates the weighed updates.
        hostile: how many hostile clients a round must withstand, >= 0; it needs
            ``2 hostile + 1`` updates.
        weighting: ``uniform`` counts clients alike, ``examples`` by what they say.
        smoothing: least distance that counts, > 0; of a change nearer to the median it is this.
        iterations: most steps, >= 1.
        head: whether the head counts in distances too.
    """

    hostile: Annotated[int, Range(0)] = 1
    weighting: Counting = "uniform"
    smoothing: Annotated[float, Range(0, open_low=True, open_high=True)] = 1e-6
    iterations: Annotated[int, Range(1)] = 1000
    head: bool = True

    mean_options: ClassVar[Mapping[str, Any]] = {
        "inner": "ffa-lora",
        "weighting": "examples",
        "smoothing": 1e30,
    }

    @property
    def needs(self) -> Needs:
        """A minority of hostile clients: n > 2f."""
        return needs_with(self.inner, 2 * self.hostile + 1)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the updates, weighed."""
        places, inner = finite(gram(adapter, updates, self.head))
        kept = counted([updates[i] for i in places], self.weighting)
        shares = torch.tensor([u.weight * u.num_examples for u in kept], dtype=torch.float64)
        pulls = _weiszfeld(inner, shares, self.smoothing, self.iterations)
        out = [u.client for i, u in enumerate(updates) if i not in places]
        return weighed(kept, pulls.tolist()), told(out)


def _weiszfeld(inner: Tensor, shares: Tensor, smoothing: float, iterations: int) -> Tensor:
    """Return by what to multiply each share, so that the weighted mean is the geometric median.

    Args:
        inner: ``[n, n]``, inner products of the points.
        shares: ``[n]``, what each point counts, >= 0.
        smoothing: least distance that counts.
        iterations: most steps.
    """
    pulls = torch.ones_like(shares)
    if not float(shares.sum()):
        return pulls
    for _ in range(iterations):
        weights = shares * pulls / (shares * pulls).sum()
        along = inner @ weights
        squared = weights @ along - 2 * along + inner.diagonal()
        nearer = 1 / squared.clamp(min=0).sqrt().clamp(min=smoothing)
        nearer = nearer / nearer.max()
        still = float((nearer - pulls).abs().max()) <= _STILL
        pulls = nearer
        if still:
            break
    return pulls
