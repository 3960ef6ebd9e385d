"""Any merge with a weight of its own for every adapter in every layer.

Source: LoRA Soups, arXiv 2410.13025, learns such weights for ``cat``. A weight of a layer
multiplies that layer's change before the merge, so that every method takes them.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.terms import BadMerge, merge_terms

MEAN_OPTIONS: Mapping[str, Any] = {"layers": {}}
WEIGHTS = "sums"
_SCALING = ".scaling"


def layer_wise(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    layers: Mapping[str, list[float]],
    method: str = "cat",
    options: Mapping[str, Any] = {},
) -> dict[str, Tensor]:
    """Multiply the adapters' layers by weights of their own, then merge them by another method.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter, for all of its layers.
        layers: for layers whose name fits a pattern (``*.layer.0.*``), a number for each adapter;
            the first that fits counts, and others are as they are. 0 leaves the layer out.
        method: the merge, by name.
        options: its options.

    Returns:
        What that merge returns.

    Raises:
        BadMerge: if a pattern fits no layer or has not a finite number for each adapter, and as
            the merge.
        UnknownPlugin, BadOptions: if there is no such merge, or it has no such options.
    """
    from strategies.merges import MERGES  # this is one of them

    plugin = MERGES.get(method)
    checked = plugin.check(options)
    names = list(merge_terms(adapters, weights))
    factors = {name: _factors(name, layers) for name in names}
    for pattern, numbers in layers.items():
        if len(numbers) != len(adapters):
            raise BadMerge(
                f"layers has {len(numbers)} numbers for {pattern!r} and there are {len(adapters)} "
                "adapters; give one for each"
            )
        if not all(map(math.isfinite, numbers)):
            raise BadMerge(f"the numbers of {pattern!r} must be finite, got {list(numbers)}")
        if not fnmatch.filter(names, pattern):
            raise BadMerge(
                f"no layer is called like {pattern!r}; there are {names[0]!r} and "
                f"{len(names) - 1} more"
            )
    scaled = [_scaled(one, number, factors) for number, one in enumerate(adapters)]
    merged: dict[str, Tensor] = plugin.build(scaled, weights, **checked)
    return merged


def _factors(name: str, layers: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
    return next((f for pattern, f in layers.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _scaled(
    adapter: Tensors, number: int, factors: Mapping[str, Sequence[float] | None]
) -> dict[str, Tensor]:
    """Return an adapter whose layers' scalings are multiplied."""
    found = dict(adapter)
    for name, chosen in factors.items():
        if chosen is not None and name + _SCALING in adapter:
            found[name + _SCALING] = adapter[name + _SCALING] * torch.tensor(chosen[number])
    return found
