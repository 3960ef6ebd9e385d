"""EigenLoRAx: the adapters' principal directions are one basis, in which their changes are summed.

Source: arXiv 2502.04700. What the basis is, and what of the authors' code is left out, is told in
:mod:`strategies.subspaces`; :mod:`strategies.shared` has one basis and a core for each of many
tasks, of which this is the sum, and ``weft merge --apart`` stores them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.shared import share
from strategies.tensors import lora_tensors
from strategies.terms import Measured, merge_terms, merged_factors

MEAN_OPTIONS: Mapping[str, Any] = {"energy": 1.0}
WEIGHTS = "sums"


def eigenlorax(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    rank: Annotated[int | None, Range(1)] = None,
    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None,
) -> Measured:
    """Sum the adapters' products in the principal subspace that they share.

    Unlike ``svd``, which keeps what is large of the sum, this keeps what is large of the adapters,
    also where they cancel in the sum; the basis does not depend on the weights.
    O((out + in) R²) for a sum of ranks R; never forms the out x in product.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; they take no part in the basis.
        rank: most directions of each side, >= 1. Without ``rank`` and ``energy``, the largest rank
            that an adapter has in the layer.
        energy: keep the fewest directions with at least this share of the squared singular values
            of the columns, and of the rows, in (0, 1]. With ``rank``, the smaller of the two.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the adapters' squared norms the basis keeps, and ``captured_energy_of/N`` how much of
        adapter N's, 0 to 1.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    found = share(layers, rank, energy)
    made = {}
    for name, terms in layers.items():
        one = found.layers[name]
        core = sum(t.weight * one.cores[t.adapter] for t in terms)
        made[name] = merged_factors(one.b @ core, one.a, terms)
    return Measured(lora_tensors(made), found.metrics)
