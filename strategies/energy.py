"""How much of what several adapters change together a merge of them keeps, in factored form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import lora_layers
from strategies.terms import merge_terms, stack


def captured_energy(
    task_vectors: Sequence[Tensors], weights: Sequence[float], merged: Tensors
) -> dict[str, float]:
    """Return the share of the weighted sum's squared norm that lies along a merge.

    With the exact sum of the products S and the merge's product M it is ``<S, M>² / (|S|² |M|²)``,
    the squared cosine between them. It is 1 of an exact merge; of the nearest product of a rank it
    is the share of the squared singular values that were kept; and it does not ask how long M is,
    so that a mean and a sum count alike. Of what is no sum, such as TIES, it says how far from the
    sum it went.

    O((out + in) R²) a layer, for a sum of ranks R; never forms the out x in product.

    Args:
        task_vectors: low-rank layers of one base model each, nothing else.
        weights: of each, as they were given to the merge.
        merged: what came of it, likewise low-rank; a layer that it has not is zero there.

    Returns:
        ``captured_energy`` of all layers together and ``captured_energy/LAYER``, 0 to 1; 1 where
        the sum is zero.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
        NotLowRank: if the merge has no low-rank layers.
    """
    made = lora_layers(merged)
    parts = {}
    for name, terms in merge_terms(task_vectors, weights).items():
        b, a = stack(terms)
        if name in made:
            own = made[name]
            left, right = own.b.double() * own.scaling.item(), own.a.double()
        else:
            left, right = torch.zeros_like(b[:, :1]), torch.zeros_like(a[:1])
        own_norm = product_inner(left, right, left, right)
        sums = [product_inner(b, a, left, right), product_inner(b, a, b, a), own_norm]
        parts[name] = torch.tensor(sums, dtype=torch.float64)
    shares = {f"captured_energy/{name}": _share(part) for name, part in parts.items()}
    return {"captured_energy": _share(torch.stack(list(parts.values())).sum(0)), **shares}


def product_inner(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> float:
    """Return the inner product of ``b @ a`` and ``other_b @ other_a`` from the factors, float64.

    >>> one = torch.tensor([[1.0, 2.0]])
    >>> product_inner(one.T, one, one.T, one)
    25.0
    """
    left, right = b.double().T @ other_b.double(), a.double() @ other_a.double().T
    return float((left * right).sum())


def _share(part: Tensor) -> float:
    inner, whole, own = part.tolist()
    if whole <= 0:
        return 1.0
    return min(1.0, inner * inner / (whole * own)) if own > 0 else 0.0
