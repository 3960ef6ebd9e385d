"""Split one data set into parts, to simulate clients that do not exist.

Pure functions: every index is in exactly one part, parts are in ascending order, and the same seed
gives the same parts in every process and on every machine.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence


def iid(num_examples: int, total: int, seed: int) -> list[list[int]]:
    """Return ``total`` random parts of equal size, up to one example.

    Args:
        num_examples: >= 0; with fewer than ``total``, the last parts are empty.
        total: number of parts, >= 1.
        seed: of the order in which examples are dealt.
    """
    order = _shuffled(range(num_examples), random.Random(f"iid:{seed}"))
    return [sorted(order[part::total]) for part in range(total)]


def dirichlet(labels: Sequence[int], total: int, alpha: float, seed: int) -> list[list[int]]:
    """Return ``total`` parts whose label shares differ: label skew, arXiv 1909.06335, section 3.

    Each class is spread over the parts in proportions drawn from Dirichlet(alpha, …, alpha). We
    draw per class rather than per client, so that every example is used once. A part that is left
    empty takes one example from the largest part, while there is a part that has two.

    Args:
        labels: the class of every example.
        total: number of parts, >= 1.
        alpha: concentration, > 0; near 0 each class sits in one part, towards infinity the parts
            are alike.
        seed: of the proportions and of who goes where.
    """
    rng = random.Random(f"dirichlet:{seed}")
    parts: list[list[int]] = [[] for _ in range(total)]
    for label in sorted(set(labels)):
        members = _shuffled([i for i, other in enumerate(labels) if other == label], rng)
        shares = itertools.accumulate(_proportions(total, alpha, rng))
        cuts = [0, *(round(min(share, 1.0) * len(members)) for share in shares)]
        cuts[-1] = len(members)  # whatever rounding did
        for part, (start, stop) in zip(parts, itertools.pairwise(cuts), strict=True):
            part.extend(members[start:stop])
    for part in parts:
        largest = max(parts, key=len)
        if not part and len(largest) > 1:
            part.append(largest.pop())
    return [sorted(part) for part in parts]


def column(values: Sequence[str]) -> dict[str, list[int]]:
    """Return one part for each distinct value, in the values' order."""
    parts: dict[str, list[int]] = {value: [] for value in sorted(set(values))}
    for index, value in enumerate(values):
        parts[value].append(index)
    return parts


def _shuffled(items: Sequence[int], rng: random.Random) -> list[int]:
    # Python promises that random() stays the same between versions, and nothing about shuffle().
    return sorted(items, key=lambda _: rng.random())


def _proportions(total: int, alpha: float, rng: random.Random) -> list[float]:
    """Return a draw from the symmetric Dirichlet distribution of ``total`` parts.

    In logarithms, since a small ``alpha`` draws gamma variates that underflow to zero:
    Gamma(alpha) = Gamma(alpha + 1) U^(1/alpha).
    """
    logs = [
        math.log(rng.gammavariate(alpha + 1.0, 1.0)) + math.log(1.0 - rng.random()) / alpha
        for _ in range(total)
    ]
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    scale = sum(weights)
    return [weight / scale for weight in weights]
