"""A weighted sum of tensors in float64 that waits little for memory.

A float64 sum is twice the bytes of a float32 term, and read and written for each: so all the terms
at hand are added to a part of the sum while that is in the processor's cache. And they are
converted in memory that is there already: new pages cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PART = 2**18  # elements, which are 2 MiB of a sum


def plus(before: Tensor | None, terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``before`` plus the weighted terms, in float64; ``before`` itself, changed.

    Terms are added one by one in their order: those of one call or of several give the same bits.

    Args:
        before: the sum so far, contiguous; None for zero.
        terms: of one shape; at least one where there is no ``before``.
        weights: one for each term.

    >>> plus(None, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])], [0.5, 1.0])
    tensor([3.5000, 6.0000], dtype=torch.float64)
    """
    if before is None:
        form = torch.contiguous_format
        before = terms[0].to(torch.float64, memory_format=form, copy=True).mul_(weights[0])
        terms, weights = terms[1:], weights[1:]
    if before.numel() > _PART:
        cut = (torch.split(tensor.reshape(-1), _PART) for tensor in (before, *terms))
        for part, *others in zip(*cut, strict=True):
            plus(part, others, weights)
        return before
    converted = torch.empty_like(before)
    for term, weight in zip(terms, weights, strict=True):
        before.add_(converted.copy_(term), alpha=weight)
    return before
