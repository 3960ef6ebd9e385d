"""Coordinate-wise median: what most clients do, entry by entry.

Source: arXiv 1803.01498 (algorithm 1, option I).
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.coordinates import CoordinateRule


@dataclass(frozen=True)
class Median(CoordinateRule):
    """Each entry becomes the median of the clients' values; withstands a hostile minority.

    Of an even number it is the mean of the middle two. Clients count alike. It depends on the basis
    that the trained factor is written in, as no rule on products does.

    Attributes:
        inner: a strategy in which clients share one factor of each product.
        hostile: how many hostile clients a round must withstand, >= 0; it needs
            ``2 hostile + 1`` updates.
    """

    def dropped(self, num_updates: int) -> int:
        """Return how many leave the middle one or two."""
        return (num_updates - 1) // 2
