"""FlexLoRA: the mean of the clients' products, and to each client its best approximation.

Source: arXiv 2402.11505 (section 3). Two differences from the authors' code:

* The mean and its singular value decomposition are taken of stacked factors, never of the dense
  product as long as that is the larger.
* Every client trains with the version's own scaling, whatever its rank, so that factors of any rank
  mean the same and a lower rank is a cut; the code divides by a fixed alpha over the client's rank.

What to expect: a client below the rank of the mean starts from another model than the rest, off by
the tail of the singular values. Where ranks differ, energy moves to the ranks that all clients have
(arXiv 2602.13486 calls it rank collapse). A's rows come out orthonormal, ``sqrt(3)`` times as long
as PEFT draws them: tune the learning rate, or set ``row_scale: 0.577``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.products import at_rank, captured, nearest, product_means
from strategies.tensors import ALL_TRAINED, Weighting, lora_layers, lora_tensors, refactor


@dataclass(frozen=True, slots=True)
class FlexLoRA:
    """Clients train A and B at their own ranks; the server cuts the mean of their products.

    The next product is the best approximation of the weighted mean at the adapter's rank; exact
    where the mean has no higher rank. How much of it was kept is ``captured_energy``, by layer
    ``captured_energy/LAYER``, and at a client's lower rank ``captured_energy_at_RANK``.

    Attributes:
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1.
        row_scale: norm of the rows of A after a round, > 0; 1 is the paper's, and ``1/sqrt(3)`` the
            norm of PEFT's initialisation.
    """

    weighting: Weighting = "examples"
    row_scale: Annotated[float, Range(0, open_low=True, open_high=True)] = 1.0

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"any-rank", "exact", "private", "streaming"}
    )
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return ``adapter`` as the state; nothing of ``setting`` is used.

        A product that is there already is split by its singular values, so that a lower rank gets
        the most of it; where there is none, A stays as it was drawn.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        layers = lora_layers(adapter)
        split = {n: refactor(f, self.row_scale) if f.b.any() else f for n, f in layers.items()}
        return ServerState({**adapter, **lora_tensors(split)})

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter at the client's rank, all of it to be trained but the scalings."""
        return Broadcast(at_rank(state.adapter, client.rank), trainable=ALL_TRAINED)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with the mean of the products, cut to the adapter's rank.

        Raises:
            BadUpdate: if the updates do not fit the adapter.
        """
        ranks: set[int] = set()

        def watched() -> Iterator[Update]:
            for update in updates:
                ranks.update(len(t) for n, t in update.tensors.items() if ".lora_A." in n)
                yield update

        means, rest = product_means(watched(), state.adapter, self.weighting)
        layers = lora_layers(state.adapter)
        found = {name: nearest(mean, layers[name], self.row_scale) for name, mean in means.items()}
        cut = lora_tensors({name: factors for name, (factors, _) in found.items()})
        kept = {name: best for name, (_, best) in found.items()}
        lower = {rank for rank in ranks if any(rank < len(f.a) for f in layers.values())}
        metrics = captured(kept, {n: f.scaling for n, f in layers.items()}, lower) if found else {}
        return ServerState({**state.adapter, **rest, **cut}, state.auxiliary, metrics)
