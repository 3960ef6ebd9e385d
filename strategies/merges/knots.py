"""KnOTS: the adapters are written in one basis of their outputs, and merged there by TIES.

Source: arXiv 2410.19735. The adapters' products side by side, ``[out, T in]``, have one singular
value decomposition ``U S [V_1 .. V_T]``; what is merged is ``S V_i``, and ``U`` times that is the
result. The authors' code multiplies B and A without their scaling; here it counts. U lies in the
span of the B's, so that everything is found from the factors, and the result has low rank exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.entrywise import Scope, elected, smallest_kept
from strategies.plugins import Range
from strategies.products import Best, best, captured
from strategies.tensors import lora_tensors
from strategies.terms import Measured, Term, merge_terms, merged_factors

MEAN_OPTIONS: Mapping[str, Any] = {"density": 1.0}
WEIGHTS = "ratios"
_ROUNDING = 1e-6  # relative, of singular values of float32 factors


def knots(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, open_low=True)] = 0.2,
    scope: Scope = "model",
    scale: Annotated[float, Range(0, open_low=True)] = 1.0,
    rank: Annotated[int | None, Range(1)] = None,
) -> Measured:
    """Merge the adapters by TIES in the basis of their common output directions.

    O((out + T in) R²) for T adapters with a sum of ranks R; never forms an out x in product.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: how much each adapter counts, in the election of signs and in the mean; only their
            ratios matter. They take no part in the basis.
        density: share of an adapter's entries in that basis that are kept, in (0, 1].
        scope: ``model`` keeps that share of all layers together, ``layer`` of each.
        scale: what the result is multiplied by, > 0.
        rank: largest rank to keep, >= 1; without it all, at most the sum of the adapters' ranks.

    Returns:
        The adapter; its metrics ``captured_energy`` and ``captured_energy/LAYER`` say how much of
        the squared norm of the merged product ``rank`` keeps; 1 without it.

    Raises:
        BadMerge: if the adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    aligned = {name: _aligned(terms) for name, terms in layers.items()}
    least = smallest_kept(
        {
            (name, term.adapter): part
            for name, (_, parts) in aligned.items()
            for term, part in zip(layers[name], parts, strict=True)
        },
        density,
        scope,
    )
    found: dict[str, Best] = {}
    for name, (basis, parts) in aligned.items():
        terms = layers[name]
        bounds = torch.tensor([least[name, t.adapter] for t in terms])[:, None, None]
        counts = torch.tensor([t.weight for t in terms], dtype=torch.float64)[:, None, None]
        kept = torch.where(parts.abs().float() >= bounds, parts, 0.0)
        merged = elected(kept * counts, counts, normalize=True) * scale
        found[name] = best(basis, merged, min(len(merged), rank or len(merged)))
    made = {
        n: merged_factors(one.b, one.a[: one.b.shape[1]], layers[n]) for n, one in found.items()
    }
    return Measured(lora_tensors(made), captured(found, dict.fromkeys(found, torch.tensor(1.0))))


def _aligned(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Return U, ``[out, k]``, and ``S V_i`` of every adapter, ``[terms, k, in]``."""
    b = [t.factors.b.double() * t.factors.scaling.item() for t in terms]
    q, r = torch.linalg.qr(torch.cat(b, dim=1))
    ranks = [one.shape[1] for one in b]
    parts = [
        own @ t.factors.a.double() for own, t in zip(r.split(ranks, dim=1), terms, strict=True)
    ]
    u, s, vh = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    k = max(1, int((s > s[:1] * _ROUNDING).sum()))
    shared = (s[:k, None] * vh[:k]).split(parts[0].shape[1], dim=1)
    return q @ u[:, :k], torch.stack(shared)
