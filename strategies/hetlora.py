"""HetLoRA: factors of other ranks are padded with zeros and averaged, and cut on the way back.

Source: arXiv 2401.06432 (section 3). Differences from the paper:

* Weights are those of each layer's own product, not of the whole adapter's.
* A client gives up ranks (``prune``) layer by layer: each layer has its own rank, and they part.
  Where every client's rank begins is in the run's config.

What to expect: the mean of the factors is not the mean of the products. Zeros pull the high ranks
down, and one that no client of a round holds is gone for good (A and B are zero there): ``masked``
divides each rank by the weight of those who hold it, and is unbiased. Weighing by norm rewards a
client that diverged or means harm: bound the norms of updates, or weigh by ``examples``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.drift import AveragingError
from strategies.plugins import Range
from strategies.products import at_rank, captured_by_cut, sent_factors
from strategies.pruning import PruningRule, asking
from strategies.tensors import (
    ALL_TRAINED,
    Factors,
    Weighting,
    lora_layers,
    lora_tensors,
    product_norm,
    weight_of,
    weighted_mean,
)


@dataclass(frozen=True, slots=True)
class HetLoRA:
    """Clients train A and B at their own ranks; the server averages them, padded with zeros.

    A client of rank r has the first r rows of A and columns of B. What is no factor is averaged by
    examples (by 1 with ``uniform``). What that loses of the mean product (of the same weights) is
    ``averaging_error``, and what a client of a lower rank has of the result
    ``captured_energy_at_RANK``, each by layer too.

    Attributes:
        weighting: ``norm`` counts a client's layer by the norm of its product, as in the paper;
            ``examples`` counts a client by its number of examples, ``uniform`` by 1.
        masked: divide each rank by the weight of the clients that hold it, and keep those that
            none does. Off, as in the paper, the others' zeros count.
        prune: the share of its ranks, in (0, 1), that a client goes on with in a layer whose last
            ranks are smaller after a round than before, ``|B| |A|``; it does so for good, and by
            its data. None for never.
        penalty: what presses these ranks down while it trains, >= 0: times ``|B| |A|`` in the loss.
        least_rank: the rank that ``prune`` goes down to at most, >= 1.
    """

    weighting: Literal["norm", "examples", "uniform"] = "norm"
    masked: bool = False
    prune: Annotated[float | None, Range(0, 1, open_low=True, open_high=True)] = None
    penalty: Annotated[float, Range(0, open_high=True)] = 0.01
    least_rank: Annotated[int, Range(1)] = 1

    mean_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """Additive unless it weighs by norm, which is not that of the change, or ranks differ."""
        found = {"any-rank", "streaming"}
        if self.prune is not None:
            return frozenset(found | {"selects"})
        weighs = {"additive"} if self.weighting != "norm" else set[str]()
        return frozenset(found | {"private"} | weighs)

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter at the client's rank, all of it to be trained but the scalings."""
        sent = Broadcast(at_rank(state.adapter, client.rank), trainable=ALL_TRAINED)
        if self.prune is None:
            return sent
        return replace(sent, extra=asking(PruningRule(self.prune, self.penalty, self.least_rank)))

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with averaged factors, and the mean of all else.

        A layer in which all products are zero stays as it is where norms are the weights.

        Raises:
            BadUpdate: if the updates do not fit the adapter.
        """
        layers = lora_layers(state.adapter)
        sums = {name: _Padded(factors) for name, factors in layers.items()}
        error = AveragingError(state.adapter, "uniform", loose=self.masked)
        ranks: set[int] = set()
        by: Weighting = "uniform" if self.weighting == "uniform" else "examples"

        def counted() -> Iterator[Update]:
            for update in updates:
                for name, factors in sent_factors(update, layers).items():
                    weight = weight_of(update, by)
                    if self.weighting == "norm":
                        norm = product_norm(factors.b, factors.a)
                        weight = norm * weight_of(update, "uniform")
                    sums[name].add(factors, weight)
                    if weight:
                        error.add(name, weight, *_padded(factors, len(layers[name].a)))
                    if self.prune is None:  # else there may be one for every layer and client
                        ranks.add(len(factors.a))
                names = lora_tensors(layers)
                others = {n: t for n, t in update.tensors.items() if n not in names}
                yield replace(update, tensors=others)

        rest = weighted_mean(counted(), state.adapter, by)
        made = {name: total.mean(self.masked) for name, total in sums.items()}
        adapter = {**state.adapter, **rest, **lora_tensors(made)}
        metrics = {**error.metrics(adapter), **captured_by_cut(made, ranks)}
        return ServerState(adapter, state.auxiliary, metrics)


def _padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``b`` and ``a`` at a rank, with zeros where the factors have a lower one."""
    more = rank - len(factors.a)
    return pad(factors.b, (0, more)), pad(factors.a, (0, 0, 0, more))


@dataclass(slots=True)
class _Padded:
    """A running sum of one layer's factors of any rank, padded with zeros.

    Attributes:
        like: the adapter's layer, of the largest rank.
    """

    like: Factors
    _a: Tensor = field(init=False)
    _b: Tensor = field(init=False)
    _held: Tensor = field(init=False)  # [rank], the weight of those who hold it
    _total: float = 0.0

    def __post_init__(self) -> None:
        self._a = torch.zeros_like(self.like.a, dtype=torch.float64)
        self._b = torch.zeros_like(self.like.b, dtype=torch.float64)
        self._held = self._a.new_zeros(len(self._a))

    def add(self, factors: Factors, weight: float) -> None:
        rank = len(factors.a)
        self._a[:rank].add_(factors.a.double(), alpha=weight)
        self._b[:, :rank].add_(factors.b.double(), alpha=weight)
        self._held[:rank] += weight
        self._total += weight

    def mean(self, masked: bool) -> Factors:
        """Return the mean; with ``masked``, of each rank over those who hold it."""
        if self._total == 0:
            return self.like
        weight = self._held if masked else torch.full_like(self._held, self._total)
        known = weight > 0
        divisor = torch.where(known, weight, 1.0)
        a = torch.where(known[:, None], self._a / divisor[:, None], self.like.a.double())
        b = torch.where(known, self._b / divisor, self.like.b.double())
        return Factors(a.to(self.like.a.dtype), b.to(self.like.b.dtype), self.like.scaling)
