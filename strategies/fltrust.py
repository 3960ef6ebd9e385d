"""FLTrust: clients are trusted as far as they agree with one that is.

Source: arXiv 2012.13995 (algorithm 2). There the server trains on a root data set of its own; here
a named client does, so that it trains as all others do. Its update is the yardstick and takes no
other part, as in the paper. Angles and norms are of changes of the products and the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from strategies.base import Needs, Tensors, Update
from strategies.geometry import factor_for, gram, scaled
from strategies.robust import RobustRule, counted, refuse_inner_needs, told, weighed


@dataclass(frozen=True)
class FLTrust(RobustRule):
    """Changes are scaled to the length of a trusted client's and weighed by the cosine with it.

    Who points away from it counts nothing. Withstands any number of hostile clients as long as the
    trusted one is honest and its data are like the task's; it learns nothing that these do not
    show. Without that client's update a round changes nothing.

    Attributes:
        inner: the strategy that aggregates the weighed updates.
        root: name of the trusted client; it must be asked in every round.
        head: whether the head counts in angles and norms too.
    """

    root: str = "root"
    head: bool = True

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "ffa-lora", "root": "a"}

    def __post_init__(self) -> None:
        RobustRule.__post_init__(self)
        refuse_inner_needs(self.inner, 1)
        if "any-rank" in self.inner.capabilities and "shared-gauge" not in self.inner.capabilities:
            raise ValueError(
                "a change between products of different ranks cannot be scaled by scaling that of "
                "its factors; wrap a strategy of one rank, or use krum or geometric-median"
            )

    @property
    def needs(self) -> Needs:
        """The trusted client's update, and another."""
        return Needs(2, self.root)

    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the updates that are trusted, scaled and weighed."""
        inner = gram(adapter, updates, self.head)
        norms = inner.diagonal().sqrt().tolist()
        roots = [i for i, update in enumerate(updates) if update.client == self.root]
        others = [i for i in range(len(updates)) if i not in roots]
        trust = dict.fromkeys(others, 0.0)
        for i in others if roots else ():
            both = norms[i] * norms[roots[0]]
            if 0 < both < math.inf:
                trust[i] = max(0.0, float(inner[i, roots[0]]) / both)  # eq. 2
        trusted = [i for i in others if trust[i]]
        left = [
            scaled(adapter, u, factor_for(adapter, u, norms[roots[0]], self.head))  # eq. 3
            for u in (updates[i] for i in trusted)
        ]
        metrics = told(updates[i].client for i in others if i not in trusted)
        return weighed(counted(left, "uniform"), [trust[i] for i in trusted]), metrics  # eq. 4
