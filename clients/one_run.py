"""What right guesses prove of privacy: an empirical lower bound on epsilon from one run.

Source: arXiv 2305.08846 (Steinke, Nasr, Jagielski), theorem 5.2 and corollary 5.4, and appendix D,
which has numbers to compare with. Each of m canaries is in the data or not, by a fair coin of its
own. Whoever sees what was released guesses some of the coins. Were the release (epsilon,
delta)-differentially private, the number of right guesses would be no larger, in distribution, than
that of coins which show the truth with probability e^epsilon / (1 + e^epsilon), but for delta. So
more right guesses than that can explain refute the epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

_STEPS = 40  # of halving: to 1e-12 of the bracket


class BadGuesses(ValueError):
    """Guesses that cannot have been made, or of which nothing follows."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """What an attack guessed, and got right.

    How many are made must not depend on the release: they are declared before.

    Attributes:
        canaries: m, each in the data or not by a fair coin, >= 1.
        made: r, of whose coins a guess was made, from 1 to m; about the others nothing was said.
        right: v, from 0 to r.

    Raises:
        BadGuesses: if a number is out of range.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.made < 1:
            raise BadGuesses(
                "of the canaries some are guessed, and of these some rightly: 1 <= made <= "
                f"canaries and 0 <= right <= made; got {self.canaries} canaries, {self.made} made, "
                f"{self.right} right"
            )


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many right guesses under (epsilon, delta)-DP.

    That is ``P[W >= v] + 2 m delta max_i P[v - i <= W < v] / i`` for W of the binomial
    distribution with r trials of probability e^epsilon / (1 + e^epsilon), and at most 1. It grows
    with delta, and with epsilon until it is above a half.

    Args:
        guesses: what was guessed.
        epsilon: of the claim, >= 0.
        delta: of the claim, from 0 to 1; it excuses 2 m delta canaries, so keep it far below 1 / m.

    Raises:
        BadGuesses: if epsilon or delta is out of range.
    """
    if not epsilon >= 0:
        raise BadGuesses(f"epsilon must be >= 0, got {epsilon}")
    if not 0 <= delta <= 1:
        raise BadGuesses(f"delta must be from 0 to 1, got {delta}")
    chances = list(_binomial(guesses.made, epsilon))
    v = guesses.right
    below, excused = 0.0, 0.0
    for i in range(1, v + 1):
        below += chances[v - i]
        excused = max(excused, below / i)
    return min(1.0, math.fsum(chances[v:]) + 2 * guesses.canaries * delta * excused)


def lower_bound(guesses: Guesses, delta: float, confidence: float = 0.95) -> float:
    """Return the epsilon that right guesses prove: what is private has a larger one, or chance.

    Whatever the release does, if it is (epsilon, delta)-differentially private, then the result is
    above ``epsilon`` with probability 1 - ``confidence`` at most. Monotone in the right guesses.

    Args:
        guesses: what was guessed.
        delta: at which epsilon is bounded, from 0 to 1.
        confidence: in [0.5, 1).

    Returns:
        Epsilon, >= 0 and finite; 0 if the guesses prove nothing.

    Raises:
        BadGuesses: if delta or confidence is out of range.
    """
    if not 0.5 <= confidence < 1:
        raise BadGuesses(f"confidence must be at least 0.5 and below 1, got {confidence}")
    chance = 1 - confidence
    if p_value(guesses, 0.0, delta) >= chance:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(guesses, high, delta) < chance:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if p_value(guesses, middle, delta) < chance:
            low = middle
        else:
            high = middle
    return low


def _binomial(trials: int, epsilon: float) -> Iterator[float]:
    """Yield the chances of 0 to ``trials`` truths; in logarithms, so that no tail is lost."""
    truth = -math.log1p(math.exp(-epsilon))
    lie = truth - epsilon
    whole = math.lgamma(trials + 1)
    for k in range(trials + 1):
        ways = whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        yield math.exp(ways + k * truth + (trials - k) * lie)
