"""What robust rules share: they choose or weigh updates, and the wrapped strategy aggregates.

A rule looks at the clients' changes of the products B A and of the head, which are the same however
a client writes its product as factors: see :mod:`strategies.geometry`. It needs a round's updates
all at once: they are held in memory, in the dtype they came in, because they can be read only once.
That is n times the size of an update, and for the distances one layer of all of them in float64.

What a client says of its number of examples is no more to be trusted than its tensors: by default
clients count alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

from torch import Tensor

from strategies.base import (
    ALONE,
    Broadcast,
    ClientSpec,
    Needs,
    ServerState,
    Setting,
    Strategy,
    Tensors,
    Update,
    needs_of,
)
from strategies.geometry import comparable
from strategies.plugins import Nested
from strategies.tensors import BadUpdate, check_update

Counting: TypeAlias = Literal["uniform", "examples"]
"""Whether clients count alike, or by the number of examples that they say they have."""

_LOST = frozenset({"additive", "exact", "mean-only", "streaming"})


class TooFewUpdates(BadUpdate):
    """A robust rule got fewer updates than it can withstand its number of hostile clients with."""


@dataclass(frozen=True)
class RobustRule(ABC):
    """A strategy that hands those updates on that a rule leaves, as it leaves them.

    Attributes:
        inner: the strategy that aggregates them.
    """

    inner: Annotated[Strategy, Nested()]

    def __post_init__(self) -> None:
        if "personal" in self.inner.capabilities:
            raise ValueError(
                "the inner strategy leaves a part of each product at its client, so that products "
                "cannot be compared; choose one in which all that is trained is sent"
            )

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the rule, and the strategy inside, need of every round."""

    @abstractmethod
    def judged(
        self, adapter: Tensors, updates: Sequence[Update]
    ) -> tuple[Sequence[Update], Mapping[str, float]]:
        """Return the updates that are left, as they are to be aggregated, and what to tell.

        Args:
            adapter: what the clients were sent.
            updates: by client; as many as are needed.
        """

    @property
    def capabilities(self) -> frozenset[str]:
        """Those of the inner strategy that a choice of updates leaves true.

        Changes in one gauge do not depend on which version they are added to; other ones do.
        """
        found = self.inner.capabilities
        return found - (_LOST - {"additive"} if "shared-gauge" in found else _LOST)

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the inner strategy's state before round 1.

        Raises:
            NotLowRank: if a layer is neither a plain product nor one with a core.
        """
        comparable(adapter)
        return self.inner.init(adapter, setting)

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return what the inner strategy sends."""
        return self.inner.broadcast(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the inner strategy's next state, from what the rule leaves of the updates.

        Raises:
            TooFewUpdates: if there are some, and fewer than are needed.
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        held = sorted(updates, key=lambda update: (update.client, update.round))
        if not held:
            return self.inner.aggregate(state, [])
        if len(held) < self.needs.updates:
            raise TooFewUpdates(
                f"{len(held)} updates are too few for the robust rule (as set), which needs "
                f"{self.needs.updates}; ask more clients, or withstand fewer hostile ones"
            )
        self._check(state.adapter, held)
        left, metrics = self.judged(state.adapter, held)
        after = self.inner.aggregate(state, left)
        return replace(after, metrics={**after.metrics, **metrics})

    def _check(self, adapter: Tensors, held: Sequence[Update]) -> None:
        for update in held:
            if "any-rank" not in self.inner.capabilities:
                check_update(update, adapter)
            odd = sorted(held[0].tensors.keys() ^ update.tensors.keys())
            if odd:
                raise BadUpdate(
                    f"the updates of {held[0].client!r} and {update.client!r} do not train the "
                    f"same tensors ({odd[0]!r} is in one only); all clients of a round must"
                )


def needs_with(inner: Strategy, updates: int) -> Needs:
    """Return what a rule needs that hands every update on and needs so many itself."""
    return Needs(max(updates, needs_of(inner).updates), needs_of(inner).client)


def refuse_inner_needs(inner: Strategy, left: int) -> None:
    """Refuse an inner strategy that needs more than a rule leaves of a round.

    Args:
        inner: the strategy inside.
        left: how many updates the rule leaves at least.

    Raises:
        ValueError: saying what it needs.
    """
    needs = needs_of(inner)
    if needs.client or needs.updates > left:
        what = f"that of {needs.client!r}" if needs.client else f"{needs.updates} updates"
        raise ValueError(
            f"the inner strategy needs {what} every round, and this rule leaves {left} of them, "
            "whichever they are; turn the two around, or wrap a strategy that needs none"
        )


def counted(updates: Iterable[Update], weighting: Counting) -> list[Update]:
    """Return the updates as they count: as they say, or each as one example."""
    if weighting == "examples":
        return list(updates)
    return [replace(update, num_examples=1) for update in updates]


def weighed(updates: Iterable[Update], weights: Iterable[float]) -> list[Update]:
    """Return the updates whose weight is not 0, each with its weight times the one it had."""
    return [
        replace(update, weight=update.weight * weight)
        for update, weight in zip(updates, weights, strict=True)
        if weight
    ]


def told(rejected: Iterable[str]) -> dict[str, float]:
    """Return how many updates a rule left out, and whose, as metrics."""
    names = sorted(rejected)
    return {"rejected": float(len(names)), **{f"rejected/{name}": 1.0 for name in names}}


def finite(inner: Tensor) -> tuple[list[int], Tensor]:
    """Return which changes have a finite norm, and the inner products ``[m, m]`` of those.

    What is too large to be squared in float64 is hostile by that alone, and would hide the others.
    """
    places = [i for i, norm in enumerate(inner.diagonal().tolist()) if norm < float("inf")]
    return places, inner[places][:, places]
