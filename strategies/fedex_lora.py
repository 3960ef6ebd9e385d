"""FedEx-LoRA: factors are averaged, and what that leaves out of the mean product lies beneath.

Source: arXiv 2410.09432 (equations 5 and 6; 12 to 16 for the cut). Differences from the authors:

* The paper adds the residual to the base weights, and its code adds the transpose, which is right
  for GPT-2's Conv1D and wrong for a square linear layer. Here the base is never changed: the
  residuals of all rounds lie beneath as one frozen adapter.
* The residual is weighted as the mean is; the code averages without weights.
* With weights ``p_k`` the residual is ``sum p_k (B_k - B)(A_k - A)``, B and A being the averages,
  so that its rank is at most that of all clients but one (the paper's bound is one rank higher).

What to expect: what lies beneath grows by up to (clients - 1) times r in every round until it is
the matrix itself, and travels to every client. ``rank`` bounds what a round adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.drift import relative
from strategies.plugins import Range
from strategies.products import (
    Best,
    RunningProduct,
    beneath_tensors,
    best,
    captured,
    laid_beneath,
    product_means,
)
from strategies.tensors import ALL_TRAINED, Factors, Weighting, lora_layers


@dataclass(frozen=True, slots=True)
class FedExLoRA:
    """Clients train A and B; the server averages them and lays the residual of the mean beneath.

    Adapter and what lies beneath together change by the weighted mean of the products, exactly
    unless ``rank`` cuts the residual. How much of the mean product the averages alone would lose
    is ``averaging_error``, by layer ``averaging_error/LAYER``.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1.
        rank: largest rank of what a round adds beneath, >= 1: the best approximation of the
            residual, with the share that was kept as ``captured_energy``. None keeps all.
    """

    weighting: Weighting = "examples"
    rank: Annotated[int | None, Range(1)] = None

    mean_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """Exact unless ``rank`` cuts."""
        exact = {"exact"} if self.rank is None else set[str]()
        return frozenset({"additive", "beneath", "private", "streaming"} | exact)

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        lora_layers(adapter)
        return ServerState(dict(adapter))

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, all of it to be trained but the scalings."""
        return Broadcast(state.adapter, trainable=ALL_TRAINED)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with averaged factors, and what they leave out beneath.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        means, mean = product_means(updates, state.adapter, self.weighting, factors_too=True)
        adapter = {**state.adapter, **mean}
        layers = lora_layers(adapter)
        wholes = {name: product.norm() for name, product in means.items()}
        residuals = {n: _residual(product, layers[n], self.rank) for n, product in means.items()}
        more = {}
        for name, found in residuals.items():
            more[name] = RunningProduct(layers[name].b.shape[0], layers[name].a.shape[1])
            more[name].add(found.b, found.a[: found.b.shape[1]], float(layers[name].scaling))
        lying = laid_beneath(state.auxiliary, more, layers)
        made = beneath_tensors({n: one.factors() for n, one in lying.items()}, layers)
        sizes = {name: abs(float(layers[name].scaling)) for name in residuals}
        metrics = relative(
            {n: (sizes[n] * math.sqrt(residuals[n].total), sizes[n] * wholes[n]) for n in sizes}
        )
        if residuals:
            metrics |= captured(residuals, {name: layers[name].scaling for name in residuals})
        return ServerState(adapter, {**state.auxiliary, **made}, metrics)


def _residual(product: RunningProduct, mean: Factors, rank: int | None) -> Best:
    """Return what the averaged factors leave out of the mean product, unscaled (equation 5)."""
    product.add(mean.b, mean.a, -1.0)
    return best(*product.factors(), rank)
