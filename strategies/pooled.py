"""Scores of many clients as one: of noised sums, or of exact scores; pure arithmetic.

A client under differential privacy tells of its data the number of units, and the sums of their
losses and of how often the model is right, each as a distance from the middle and in Gaussian
noise. A score of many clients is the ratio of their sums: each unit counts alike, wherever it is.
Sums are of as many units as they say: dividing by the noised number costs nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COUNT, LOSS, RIGHT = "count", "loss", "accuracy"
"""What is summed: units, their losses, and how often the model is right."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What a client told of its data.

    Attributes:
        sums: noised, by kind.
        noise_multiplier: of the noise, > 0.
        bound: where losses are cut off, > 0.
    """

    sums: Mapping[str, float]
    noise_multiplier: float
    bound: float

    @property
    def std(self) -> float:
        """Standard deviation of the noise in each of the sums."""
        return sums_std(self.noise_multiplier, len(self.sums))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score, and the standard error that noise alone gives it; 0 for an exact one."""

    value: float
    error: float = 0.0


def kinds(task: str) -> tuple[str, ...]:
    """Return what is summed of a task's scores, in order; a causal model is never just right."""
    return (COUNT, LOSS) if task == "causal-lm" else (COUNT, LOSS, RIGHT)


def sums_std(noise_multiplier: float, number: int) -> float:
    """Return the standard deviation of the noise in each of so many sums.

    A unit moves each by 1 at most, and so all of them by the root of their number.
    """
    return noise_multiplier * math.sqrt(number)


def scores_of(told: Sequence[Sums]) -> dict[str, Estimate]:
    """Return the scores of all clients' units together, within what a score can be.

    Args:
        told: of at least one client, with one bound.

    Returns:
        ``loss`` in [0, bound], and ``accuracy`` in [0, 1] where it was told; nothing where noise
        hides that there are any units at all. Errors are to first order, as if the scores were
        what they seem to be.
    """
    number = sum(one.sums[COUNT] for one in told)
    noise = math.sqrt(sum(one.std**2 for one in told))
    if number < max(noise, 1.0):
        return {}
    found = {}
    for kind, scale in ((LOSS, told[0].bound), (RIGHT, 1.0)):
        if kind in told[0].sums:
            ratio = sum(one.sums[kind] for one in told) / number
            value = min(max(0.5 * (1 + ratio), 0.0), 1.0)
            within = min(max(ratio, -1.0), 1.0)
            error = 0.5 * noise / number * math.sqrt(1 + within**2)
            found[kind] = Estimate(scale * value, scale * error)
    return found


def weighted(scores: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the means of exact scores, of each over the clients that have it.

    Args:
        scores: of each client, how many examples, and its scores.
    """
    names = dict.fromkeys(name for _, one in scores for name in one)
    means = {}
    for name in names:
        having = [(size, one[name]) for size, one in scores if name in one and size > 0]
        total = sum(size for size, _ in having)
        if total:
            means[name] = sum(size * value for size, value in having) / total
    return means
