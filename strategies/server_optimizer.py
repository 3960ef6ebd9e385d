"""An optimizer at the server, for which a round's mean change is a gradient.

Source: arXiv 2003.00295 (Algorithm 2, "FedOpt"). ``Delta``, the change that the inner strategy
would make, takes the place of the negative gradient. As in the paper, and unlike some published
codes, the second moment is one of ``Delta`` and not of the first moment.

Moments are taken entry by entry. Where clients train both factors, they depend on how a product is
split into B and A, and two equal models may get two different steps; ``inner: ffa-lora`` has one A
for all, in which this does not arise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Strategy, Tensors
from strategies.base import Update as Update  # for the annotations of those that inherit
from strategies.fedavg import FedAvg
from strategies.plugins import Nested

_MEAN = FedAvg()
_ANYONE = ClientSpec("anyone")


@dataclass(frozen=True, slots=True)
class FedOpt:
    """What the server optimizers share: all but the arithmetic of a step.

    Moments are float32 at least, and committed with the version. A round without updates leaves the
    adapter and the moments as they are.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
    """

    inner: Annotated[Strategy, Nested()] = _MEAN

    def __post_init__(self) -> None:
        require_additive(self.inner, "moments of earlier rounds")

    @property
    def capabilities(self) -> frozenset[str]:
        """What the inner strategy can, but that the result is no mean."""
        return self.inner.capabilities - {"exact"}

    def first(self) -> dict[str, float]:
        """Return the moments before round 1, by name; one value for all entries."""
        raise NotImplementedError

    def step(self, delta: Tensor, moments: Tensors, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is added to a tensor, and its next moments, in float64.

        Args:
            delta: the change that the inner strategy would make.
            moments: those of the rounds before, by name, of ``delta``'s shape.
            count: how many steps were taken, this one included.
        """
        raise NotImplementedError

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the inner strategy's state and the first moments."""
        state = self.inner.init(adapter, setting)
        moments = {
            self._key(moment, name): torch.full_like(tensor, value, dtype=kept_dtype(tensor))
            for name, tensor in sent_tensors(self.inner, state).items()
            for moment, value in self.first().items()
        }
        count = {self._key("steps"): torch.tensor(0)}
        return replace(state, auxiliary={**state.auxiliary, **moments, **count})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the inner strategy's."""
        return self.inner.broadcast(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state after a step along the inner strategy's change.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        seen: list[bool] = []
        after = self.inner.aggregate(state, _noted(updates, seen))
        if not seen:
            return after
        count = int(state.auxiliary[self._key("steps")]) + 1
        adapter, auxiliary = dict(after.adapter), dict(after.auxiliary)
        auxiliary[self._key("steps")] = torch.tensor(count)
        for name, tensor in sent_tensors(self.inner, state).items():
            old = tensor.double()
            moments = {m: state.auxiliary[self._key(m, name)].double() for m in self.first()}
            step, moments = self.step(after.adapter[name].double() - old, moments, count)
            adapter[name] = (old + step).to(tensor.dtype)
            auxiliary |= {self._key(m, name): t.to(kept_dtype(tensor)) for m, t in moments.items()}
        return replace(after, adapter=adapter, auxiliary=auxiliary)

    def _key(self, *parts: str) -> str:
        return "/".join((type(self).__name__.lower(), *parts))


def sent_tensors(inner: Strategy, state: ServerState) -> dict[str, Tensor]:
    """Return the tensors that clients of a strategy train and send, sorted by name."""
    sent = inner.broadcast(state, _ANYONE)
    return {
        name: state.adapter[name]
        for name in sorted(state.adapter)
        if re.fullmatch(sent.trainable, name) and not re.fullmatch(sent.personal, name)
    }


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of what is kept of a tensor from round to round: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def require_additive(inner: Strategy, what: str) -> None:
    """Refuse a strategy that changes from round to round what a change means.

    Args:
        inner: the strategy.
        what: what would be kept in the coordinates of an earlier round.

    Raises:
        ValueError: if it is one.
    """
    if "additive" not in inner.capabilities:
        raise ValueError(
            f"inner {type(inner).__name__} changes from round to round what a change means, so "
            f"that {what} would not fit the next; use fedavg or ffa-lora"
        )


def _noted(updates: Iterable[Update], seen: list[bool]) -> Iterator[Update]:
    """Yield the updates, and note that there are some."""
    for update in updates:
        seen[:] = [True]
        yield update
