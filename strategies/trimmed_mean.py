"""Trimmed mean: entry by entry, the mean without the lowest and highest values.

Source: arXiv 1803.01498 (algorithm 1, option II).
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.coordinates import CoordinateRule


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    """Each entry is averaged without its extremes; withstands a hostile minority.

    Clients count alike. It depends on the basis that the trained factor is written in, as no rule
    on products does.

    Attributes:
        inner: a strategy in which clients share one factor of each product.
        hostile: how many hostile clients a round must withstand, >= 0: so many of the lowest and
            of the highest values of each entry are left out. It needs ``2 hostile + 1`` updates;
            0 is the unweighted mean.
    """

    def dropped(self, num_updates: int) -> int:
        """Return as many as may be hostile."""
        return self.hostile
