"""Norm clipping: no client moves the model further than a bound.

Source: arXiv 1911.07963 (section 4, norm thresholding of updates). The norm is that of the change
of the products and the head, not of factors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from strategies.base import Needs, Tensors, Update
from strategies.geometry import factor_for, gram, scaled
from strategies.plugins import Range
from strategies.robust import Counting, RobustRule, counted, finite, needs_with, told


@dataclass(frozen=True)
class NormClip(RobustRule):
    """Changes longer than a bound are shortened to it; then the inner strategy aggregates.

    All tensors that a client trained move back towards the broadcast by one factor. Where one
    factor of each product is frozen, the change keeps its direction. The first line of defence: it
    bounds what a hostile client can do, and does not take it out.

    Attributes:
        inner: the strategy that aggregates the shortened updates.
        bound: greatest norm of a change, > 0; null for the median of the round's norms, which a
            minority of hostile clients cannot move beyond those of honest ones.
        weighting: ``uniform`` counts clients alike, ``examples`` by what they say.
        head: whether the head counts in the norm too. Off, it is shortened with the rest only.
    """

    bound: Annotated[float | None, Range(0, open_low=True)] = None
    weighting: Counting = "uniform"
    head: bool = True

    mean_options: ClassVar[Mapping[str, Any]] = {
        "inner": "ffa-lora",
        "bound": 1e30,
        "weighting": "examples",
    }

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        if "any-rank" in self.inner.capabilities and "shared-gauge" not in self.inner.capabilities:
            raise ValueError(
                "a change between products of different ranks cannot be shortened by shortening "
                "that of its factors; wrap a strategy of one rank, or use krum or geometric-median"
            )

    @property
    def needs(self) -> Needs:
        """What the inner strategy needs."""
        return needs_with(self.inner, 1)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the updates, none further from the broadcast than the bound."""
        inner = gram(adapter, updates, self.head)
        places, _ = finite(inner)
        norms = torch.nan_to_num(inner.diagonal(), nan=math.inf, posinf=math.inf).sqrt().tolist()
        bound = statistics.median(norms) if self.bound is None else self.bound
        left, clipped = [], 0
        for place in places:
            update = updates[place]
            if norms[place] > bound:
                clipped += 1
                factor = min(1.0, factor_for(adapter, update, bound, self.head))
                update = scaled(adapter, update, factor)
            left.append(update)
        out = [u.client for i, u in enumerate(updates) if i not in places]
        metrics = {**told(out), "clipped": float(clipped), "clip_bound": bound}
        return counted(left, self.weighting), metrics
