"""A weighted sum of tensors in float64 that waits little for memory.

A float64 sum is twice the bytes of a float32 term, and read and written for each: so all the terms
at hand are added to a part of the sum while that is in the processor's cache. And they are
converted in memory that is there already: new pages cost more than the arithmetic. Small tensors
are added together with their neighbours: a call costs as much as some thousand elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_PART = 2**18  # elements, which are 2 MiB of a sum
_BUNDLE = 2**17  # elements of small tensors that are added together


def bundles(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield names, sorted, so many at a time as have room in the cache together; one at least.

    Args:
        sizes: in elements, by name.

    >>> list(bundles({"c": 2**18, "a": 10, "b": 20}))
    [['a', 'b'], ['c']]
    """
    bundle: list[str] = []
    held = 0
    for name, size in sorted(sizes.items()):
        if bundle and held + size > _BUNDLE:
            yield bundle
            bundle, held = [], 0
        bundle.append(name)
        held += size
    if bundle:
        yield bundle


def plus_each(
    before: Sequence[Tensor] | None, terms: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> list[Tensor]:
    """Return several sums, each plus its weighted terms: the bits of :func:`plus` for each.

    Args:
        before: the sums so far, which are changed; None for zeros.
        terms: of each update its tensors, one for each sum; at least one update where there is no
            ``before``.
        weights: one for each update.
    """
    one = before if before is not None else terms[0]
    if len(one) == 1:
        return [plus(before[0] if before else None, [term[0] for term in terms], weights)]
    if before is None:
        form = torch.contiguous_format
        before = [t.to(torch.float64, memory_format=form, copy=True) for t in terms[0]]
        torch._foreach_mul_(before, weights[0])
        terms, weights = terms[1:], weights[1:]
    sums = list(before)
    converted = [torch.empty_like(total) for total in sums]
    for term, weight in zip(terms, weights, strict=True):
        torch._foreach_copy_(converted, list(term))
        torch._foreach_add_(sums, converted, alpha=weight)
    return sums


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
