"""SCAFFOLD: clients correct every step by how their gradients differ from everybody's.

Source: arXiv 1910.06378 (Algorithm 1, option II). A client's step is ``y -= lr (g - c_k + c)``, and
afterwards ``c_k += (x - y) / (steps * lr) - c``. Kept here are ``C = steps * lr * c`` and likewise
``C_k``, which are displacements: then ``C_k`` grows by ``x - y - C``, which the server learns from
the update itself, and nothing but ``y`` travels up. ``c`` doubles what travels down.

It needs optimizers for which a displacement is a sum of gradients, and rounds of as many steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import (
    ALONE,
    CORRECTION,
    Broadcast,
    ClientSpec,
    ServerState,
    Setting,
    Strategy,
    Tensors,
    Update,
    corrections,
)
from strategies.fedavg import FedAvg
from strategies.plugins import Nested
from strategies.server_optimizer import kept_dtype, require_additive, sent_tensors

_MEAN = FedAvg(weighting="uniform")
_CLIENTS = "scaffold/clients"


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Clients correct their steps by control variates, so that unlike data pull less.

    The server's variate is the mean of all clients', those included that have not trained yet,
    whose are zero. It counts clients alike, whatever their weights in the mean: an inner strategy
    that weighs them otherwise is corrected towards another mean than its own. A client whose update
    is lost on its way has learnt its variate all the same, and the two drift apart by as much.

    Under DP the corrections cost nothing: they come from released values only, and are added after
    the noise.

    Attributes:
        inner: how a round's mean is made, and which tensors are trained.
    """

    inner: Annotated[Strategy, Nested()] = _MEAN

    mean_options: ClassVar[Mapping[str, Any]] = {"inner": "fedavg"}

    def __post_init__(self) -> None:
        require_additive(self.inner, "control variates")

    @property
    def capabilities(self) -> frozenset[str]:
        """What the inner strategy can, but that an update belongs to its round's correction.

        And how far the control variate moves depends on the number of updates.
        """
        return self.inner.capabilities - {"additive", "mean-only"}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the inner strategy's state, a control variate of zero, and the number of clients.

        Args:
            adapter: the tensors the run starts from.
            setting: its ``num_clients`` is the paper's N.
        """
        state = self.inner.init(adapter, setting)
        zeros = {
            CORRECTION + name: torch.zeros_like(tensor, dtype=kept_dtype(tensor))
            for name, tensor in sent_tensors(self.inner, state).items()
        }
        count = {_CLIENTS: torch.tensor(setting.num_clients)}
        return replace(state, auxiliary={**state.auxiliary, **zeros, **count})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the inner strategy's, with the control variate."""
        sent = self.inner.broadcast(state, client)
        own = {n: t for n, t in state.auxiliary.items() if n.startswith(CORRECTION)}
        return replace(sent, extra={**sent.extra, **own})

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the inner strategy's state and the next control variate.

        ``C += |S| / N (mean_S(x - y_k) - C)``: lines 16 and 17 of the algorithm in displacements.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        sums: dict[str, Tensor] = {}
        counts: list[int] = [0]
        after = self.inner.aggregate(state, _watched(updates, state.adapter, sums, counts))
        share = counts[0] / int(state.auxiliary[_CLIENTS])
        moved = {}
        for name, old in corrections(state.auxiliary).items():
            if name in sums:
                step = sums[name] / counts[0] - old.double()
                moved[CORRECTION + name] = (old.double() + share * step).to(old.dtype)
        return replace(after, auxiliary={**after.auxiliary, **moved})


def _watched(
    updates: Iterable[Update], start: Tensors, sums: dict[str, Tensor], counts: list[int]
) -> Iterator[Update]:
    """Yield the updates; add up their displacements ``x - y`` in float64, and count them."""
    for update in updates:
        yield update  # and hear of it first if it does not fit
        counts[0] += 1
        for name, tensor in update.tensors.items():
            moved = start[name].double() - tensor.double()
            sums[name] = sums[name] + moved if name in sums else moved
