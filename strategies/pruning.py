"""How clients come to lower ranks by themselves, where a strategy asks them to: the words for it.

Source: arXiv 2401.06432 (section 3.2, rank self-pruning). A client presses its last ranks down by a
penalty, and gives them up once they are smaller than they were when the round began; from then on
it trains and sends fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, lora_layers, lora_tensors

_KEEP, _WEIGHT, _LEAST = "pruning/keep", "pruning/weight", "pruning/least"


class PruningRule(NamedTuple):
    """What clients are asked.

    Attributes:
        keep: the share of its ranks that a client keeps when it gives some up, in (0, 1).
        weight: of the penalty on those that it may give up, >= 0.
        least: the rank that no layer goes below, >= 1.
    """

    keep: float
    weight: float
    least: int

    def below(self, rank: int) -> int:
        """Return the rank that a layer of this one may go down to; the same for none.

        >>> [PruningRule(0.5, 0.01, 2).below(rank) for rank in (9, 3, 2, 1)]
        [4, 2, 2, 1]
        """
        return min(rank, max(self.least, int(self.keep * rank + 1e-9)))


def asking(pruning: PruningRule) -> dict[str, Tensor]:
    """Return it as extra tensors of a broadcast; the same objects for the same values."""
    return dict(zip((_KEEP, _WEIGHT, _LEAST), map(_number, pruning), strict=True))


@lru_cache(maxsize=256)
def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def pruning_of(extra: Tensors) -> PruningRule | None:
    """Return what a broadcast's extra tensors ask, or None.

    >>> pruning_of(asking(PruningRule(0.5, 0.01, 2)))
    PruningRule(keep=0.5, weight=0.01, least=2)
    """
    if _KEEP not in extra:
        return None
    return PruningRule(float(extra[_KEEP]), float(extra[_WEIGHT]), int(extra[_LEAST]))


def cut(tensors: Tensors, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return tensors with the first ranks alone of the layers that are named.

    Args:
        tensors: with whole layers.
        ranks: by layer, each at most the layer's own.
    """
    layers = {n: f for n, f in lora_layers(tensors).items() if n in ranks} if ranks else {}
    lower = {
        n: Factors(f.a[: ranks[n]].clone(), f.b[:, : ranks[n]].clone(), f.scaling)
        for n, f in layers.items()
    }
    return {**tensors, **lora_tensors(lower)}


def ranks_in(tensors: Tensors, sent: Tensors) -> dict[str, int]:
    """Return the ranks of those layers that came with fewer than were sent, by layer.

    What does not fit in another way is left out, to be refused for that.

    Args:
        tensors: what came.
        sent: the adapter as it was sent.
    """
    found = {}
    for name, own in lora_layers(sent).items():
        a, b = (tensors.get(n) for n in list(lora_tensors({name: own}))[:2])
        if a is None or b is None or a.dim() != 2 or b.dim() != 2:
            continue
        if a.shape[0] == b.shape[1] and 1 <= a.shape[0] < len(own.a):
            found[name] = a.shape[0]
    return found
