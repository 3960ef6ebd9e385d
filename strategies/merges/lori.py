"""LoRI: adapters whose B is zero off a mask, side by side or in one B.

Source: arXiv 2504.07448, which concatenates them, or sums them by PEFT's ``linear``. Its A's are
drawn anew for every task there, so that ``linear`` has cross terms, and overlapping masks add up.
Here ``linear`` needs one A, which weft's LoRI shares (see :mod:`strategies.lori`), and says what
becomes of entries that several tasks use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.lori import largest
from strategies.plugins import Range
from strategies.tensors import lora_tensors
from strategies.terms import BadMerge, Measured, Term, merge_terms, merged_factors, stack

MEAN_OPTIONS: Mapping[str, Any] = {}
WEIGHTS = "sums"
ONE_ROW_SPACE: Mapping[str, Any] = {"form": "linear"}


def lori(
    adapters: Sequence[Tensors],
    weights: Sequence[float],
    *,
    form: Literal["cat", "linear"] = "cat",
    overlap: Literal["sum", "largest"] = "sum",
    sparsity: Annotated[float | None, Range(0, 1, open_high=True)] = None,
) -> Measured:
    """Sum adapters of masked B's: exactly, by stacking, or in one B over the A that they share.

    The same product in both forms, but for ``overlap``; ``linear`` has the rank of one adapter,
    ``cat`` the sum of the ranks.

    Args:
        adapters: low-rank layers of one base model, nothing else.
        weights: one finite number for each adapter; the paper's 0.4 for four, 0.5 for three.
        form: ``cat`` takes any A's, ``linear`` equal ones.
        overlap: of an entry of B that several adapters use, ``sum`` adds them up; ``largest``
            takes that of largest magnitude, weighted, so that no task adds to another's
            entries. Needs ``linear``.
        sparsity: mask each adapter's B here: leave out that share of its entries, the smallest of
            all layers together, in [0, 1); null takes the adapters as training masked them.

    Returns:
        The adapter; its metric ``mask_overlap`` is the share of B's entries that several use of
        those that any uses, where all have one rank.

    Raises:
        BadMerge: if ``linear`` is given different A's, ``largest`` without ``linear``, or the
            adapters do not fit each other or the weights.
    """
    layers = merge_terms(adapters, weights)
    if overlap == "largest" and form != "linear":
        raise BadMerge(
            "overlap: largest chooses between entries of one B, which only form: linear has"
        )
    if sparsity is not None:
        layers = _masked(layers, sparsity)
    made = {}
    for name, terms in layers.items():
        if form == "cat":
            b, a = stack(terms)
        else:
            b, a = _one_b(name, terms, overlap), terms[0].factors.a.double()
        made[name] = merged_factors(b, a, terms)
    return Measured(lora_tensors(made), _overlap(layers))


def _masked(layers: Mapping[str, list[Term]], sparsity: float) -> dict[str, list[Term]]:
    """Return the terms with B zero but for its largest entries, over all layers of an adapter."""
    owners = sorted({term.adapter for terms in layers.values() for term in terms})
    masks: dict[int, dict[str, Tensor]] = {}
    for owner in owners:
        sizes = {
            name: term.factors.b.abs()
            for name, terms in layers.items()
            for term in terms
            if term.adapter == owner
        }
        masks[owner] = largest(sizes, 1 - sparsity)
    return {
        name: [
            t._replace(factors=t.factors._replace(b=t.factors.b * masks[t.adapter][name]))
            for t in terms
        ]
        for name, terms in layers.items()
    }


def _one_b(name: str, terms: Sequence[Term], overlap: str) -> Tensor:
    """Return the merged B over the common A, in float64.

    Raises:
        BadMerge: if there is none.
    """
    first = terms[0].factors.a
    for term in terms[1:]:
        if not torch.equal(term.factors.a, first):
            raise BadMerge(
                f"lori's form: linear needs adapters with one lora_A, but at {name!r} those of "
                f"adapters {terms[0].adapter} and {term.adapter} differ; merge with form: cat, or "
                "with linear where they span one row space"
            )
    parts = torch.stack(
        [t.factors.b.double() * (t.weight * t.factors.scaling.item()) for t in terms]
    )
    if overlap == "sum":
        return parts.sum(0)
    highest, lowest = parts.amax(0), parts.amin(0)  # of any order, the positive one of equals
    return torch.where(highest >= -lowest, highest, lowest)


def _overlap(layers: Mapping[str, Sequence[Term]]) -> dict[str, float]:
    shared = used = 0
    for terms in layers.values():
        if len({t.factors.b.shape for t in terms}) > 1:
            return {}
        counts = torch.stack([t.factors.b != 0 for t in terms]).sum(0)
        shared, used = shared + int((counts > 1).sum()), used + int((counts > 0).sum())
    return {"mask_overlap": shared / used} if used else {}
