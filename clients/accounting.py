"""Privacy accounting as pure functions over spends: how much was used, and which noise fits.

Opacus' two accountants of the Poisson-subsampled Gaussian mechanism under add/remove adjacency (and
of the one without subsampling, in which a client's change is there or is zero: ``zero-out``):
``prv`` (2106.02848), numerical and tight, and ``rdp`` (1908.10530, converted by 1905.09982), looser
and always cheap. Both are upper bounds; ``prv`` here is the smaller of the two, so where the
numerical one cannot be computed (infinite, too large a domain, too small a delta) it is ``rdp``.
What ``rdp`` gives differs from Opacus' own by a few percent: less at a small epsilon, because there
are larger orders, more at a large one, because there are fewer small ones, which are slow.

Opacus' third, ``gdp`` (1905.02383), is no bound: where examples are sampled it is a limit, short of
which it is mostly too low. It is :func:`approximate_epsilon`, for comparison, and judges nothing.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from strategies.spends import ZERO_OUT, PrivacySpend

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Opacus, and NumPy, are imported where they are used: seconds, and most commands never account.

Accountant: TypeAlias = Literal["prv", "rdp"]
_Event: TypeAlias = tuple[float, float, int]  # noise multiplier, sample rate, steps

# Orders at which the divergence is computed (below 3, fractions are series of up to 1e5 terms), and
# those at which it is used. Opacus' end at 63, which cannot show an epsilon below 0.1.
_LARGE = (*range(11, 64), 80, 96, 128, 192, 256, 384, 512)
_KNOTS = (*(x / 2 for x in range(3, 22)), *_LARGE)
_ORDERS = (*(1 + x / 20 for x in range(1, 200)), *_LARGE)
_MAX_POINTS = 2_000_000  # of the discretised loss, over all events: two seconds, 200 MB
_MIN_DELTA = 1e-10  # below it, rounding in the Fourier transform shows against delta / 1000
_MIN_NOISE, _MAX_NOISE = 0.01, 1e3
_ADJACENCIES = ("add-remove", ZERO_OUT)  # of one client in a sum, the same two distributions
_MAX_EXPONENT, _MAX_GAUSSIAN = 700.0, 500.0  # where exp ends, and Opacus' search for an epsilon
_GRID = 10_000  # noise multipliers are multiples of 1 / _GRID
_TOLERANCE = 1e-3  # relative, of a noise multiplier


class IncomposableSpends(ValueError):
    """Spends that protect different things, or of an unknown mechanism, cannot be added."""


class BudgetSpent(ValueError):
    """No noise keeps the next steps within the budget."""


def epsilon(spends: Iterable[PrivacySpend], delta: float, accountant: Accountant = "prv") -> float:
    """Return an upper bound on the epsilon of all ``spends`` together; 0 for none.

    Deterministic, and independent of the order of the spends. Some milliseconds to a few seconds;
    results are cached.

    Args:
        spends: of one population; heterogeneous noise, rates and steps compose.
        delta: in (0, 1), and below 1 / (number of examples) to mean anything.
        accountant: ``prv`` or ``rdp``.

    Returns:
        Epsilon, possibly infinite.

    Raises:
        IncomposableSpends: if units, adjacencies or mechanisms differ, or are not known here.
        ValueError: if a parameter is out of range.
    """
    if accountant not in get_args(Accountant):  # what is no bound must not pass for one
        raise ValueError(f"accountant must be prv or rdp, got {accountant!r}")
    return _epsilon(_composed(spends), _checked_delta(delta), accountant)


def approximate_epsilon(spends: Iterable[PrivacySpend], delta: float) -> float:
    """Return about the epsilon of all ``spends`` together, by Gaussian DP; 0 for none.

    Exact where every sample rate is 1 (1905.02383, corollary 3.3 and theorem 2.7). Elsewhere the
    central limit theorem's (corollary 5.4, in Poisson's form of 1911.11607): right for very many
    steps with little sampled in each, and mostly **too low** before that (2106.02848, section 1),
    by half in ordinary settings. So it is shown beside the others, and nothing is judged by it.

    Args:
        spends: of one population.
        delta: in (0, 1).

    Returns:
        Epsilon, infinite beyond 500.

    Raises:
        IncomposableSpends: if units, adjacencies or mechanisms differ, or are not known here.
        ValueError: if a parameter is out of range.
    """
    from opacus.accountants.analysis.gdp import compute_mu_poisson, delta_eps_mu, eps_from_mu

    _checked_delta(delta)
    squares = 0.0
    for noise, rate, steps in _composed(spends):
        if rate == 1:
            squares += steps / noise**2
        elif noise**-2 > _MAX_EXPONENT:
            return math.inf
        else:
            mu = compute_mu_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate)
            squares += float(mu) ** 2
    mu = math.sqrt(squares)
    if mu == 0 or delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    if delta_eps_mu(eps=_MAX_GAUSSIAN, mu=mu) > delta:
        return math.inf
    return float(eps_from_mu(mu=mu, delta=delta))


def noise_for(
    epsilon: float,
    delta: float,
    *,
    sample_rate: float,
    steps: int,
    history: Sequence[PrivacySpend] = (),
    accountant: Accountant = "prv",
) -> float:
    """Return the smallest noise multiplier that keeps ``history`` and ``steps`` more in budget.

    Guarantee: :func:`epsilon` of the history and the new spend is at most ``epsilon``. The result
    is a multiple of 1e-4 that is within 0.1 % of the smallest such value, or spends all but 0.1 %
    of the budget. About half a second; more with a long, mixed history.

    Args:
        epsilon: the whole budget, > 0, of which ``history`` has used a part.
        delta: in (0, 1).
        sample_rate: Poisson sampling probability of the new steps, in (0, 1].
        steps: how many, >= 1, over all rounds that are planned.
        history: what the population has spent.
        accountant: ``prv`` or ``rdp``.

    Returns:
        The noise multiplier, between 0.01 and 1000.

    Raises:
        BudgetSpent: if the history alone uses up the budget, or no noise up to 1000 suffices.
        ValueError: if a parameter is out of range.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    past = _composed(history)
    _checked_delta(delta)
    _checked_event(_MAX_NOISE, sample_rate, steps)

    def used(ticks: int, by: Accountant = accountant) -> float:
        event = (ticks / _GRID, float(sample_rate), int(steps))
        return _epsilon(_merged([*past, event]), delta, by)

    low, high = int(_MIN_NOISE * _GRID), int(_MAX_NOISE * _GRID)
    spent = _epsilon(past, delta, accountant)
    if spent >= epsilon or used(high) > epsilon:
        raise BudgetSpent(
            f"ε = {spent:.4g} of {epsilon:g} (δ = {delta:g}) is spent, and no noise leaves room "
            f"for {steps} more steps at sample rate {sample_rate:g}. Raise the budget or leave "
            "this population out"
        )
    if accountant == "prv" and used(high, "rdp") <= epsilon:
        # The cheap accountant's answer is an upper bracket, and mostly a near one.
        high = _smallest(lambda ticks: used(ticks, "rdp"), epsilon, low, high)
        while (lower := max(low, int(0.9 * high))) > low and used(lower) <= epsilon:
            high = lower
        low = lower
    return _smallest(used, epsilon, low, high) / _GRID


def _smallest(used: Callable[[int], float], budget: float, low: int, high: int) -> int:
    """Return the smallest number whose use is within budget, or one that is within ``_TOLERANCE``.

    Args:
        used: decreasing, about linear in logarithms; ``used(high) <= budget``.
        budget: > 0.
        low: >= 1.
        high: >= low.
    """
    older, newer = (low, used(low)), (high, used(high))
    if older[1] <= budget:
        return low
    best = newer[1]
    for turn in itertools.count(1):
        if high - low <= max(1, _TOLERANCE * high) or best >= (1 - _TOLERANCE) * budget:
            break
        guess = _secant(older, newer, (1 - _TOLERANCE / 2) * budget)
        if turn % 3 == 0 or not low < guess < high:  # a secant can creep; halving cannot
            guess = math.sqrt(low * high)
        middle = min(max(round(guess), low + 1), high - 1)
        older, newer = newer, (middle, used(middle))
        if newer[1] <= budget:
            high, best = newer
        else:
            low = middle
    return high


def _secant(a: tuple[int, float], b: tuple[int, float], target: float) -> float:
    """Return where the line through two points reaches ``target``, in logarithms; or NaN."""
    (xa, ya), (xb, yb) = ((math.log(x), math.log(max(y, 1e-12))) for x, y in (a, b))
    if ya == yb or not math.isfinite(ya + yb):
        return math.nan
    exponent = xa + (math.log(target) - ya) * (xb - xa) / (yb - ya)
    return math.exp(min(exponent, 50.0))


def _checked_delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be > 0 and < 1, got {delta}")
    return float(delta)


def _checked_event(noise: float, rate: float, steps: float) -> _Event:
    if not 0 < noise < math.inf:
        raise ValueError(f"noise_multiplier must be > 0 and finite, got {noise}")
    if not 0 < rate <= 1:
        raise ValueError(f"sample_rate must be > 0 and <= 1, got {rate}")
    if not steps >= 1 or steps != int(steps):
        raise ValueError(f"steps must be an integer >= 1, got {steps}")
    return float(noise), float(rate), int(steps)


def _composed(spends: Iterable[PrivacySpend]) -> tuple[_Event, ...]:
    """Return the spends as events, if they are about the same thing."""
    spends = list(spends)
    kinds = sorted({(s.mechanism, s.unit, s.adjacency) for s in spends})
    if len(kinds) > 1:
        listed = " and ".join("/".join(kind) for kind in kinds)
        raise IncomposableSpends(
            f"spends of {listed} cannot be added; account for each of them by itself"
        )
    if kinds and (kinds[0][0] != "gaussian" or kinds[0][2] not in _ADJACENCIES):
        raise IncomposableSpends(
            f"the accountants know gaussian/UNIT/add-remove and gaussian/UNIT/{ZERO_OUT}, got "
            f"{'/'.join(kinds[0])}"
        )
    events = []
    for spend in spends:
        try:
            noise, rate, steps = (
                spend.parameters[name] for name in ("noise_multiplier", "sample_rate", "steps")
            )
        except KeyError as error:
            raise ValueError(f"a gaussian spend needs the parameter {error.args[0]!r}") from None
        if spend.adjacency == ZERO_OUT and rate != 1:
            raise IncomposableSpends(
                f"who is in a round is known under {ZERO_OUT}, so that sampling gains nothing: "
                f"its sample_rate must be 1, got {rate:g}"
            )
        events.append(_checked_event(noise, rate, steps))
    return _merged(events)


def _merged(events: Iterable[_Event]) -> tuple[_Event, ...]:
    """Return the events sorted, those of equal noise and rate as one."""
    steps: dict[tuple[float, float], int] = {}
    for noise, rate, count in events:
        steps[noise, rate] = steps.get((noise, rate), 0) + count
    return tuple((*kind, count) for kind, count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[_Event, ...], delta: float, accountant: Accountant) -> float:
    if not events:
        return 0.0
    with warnings.catch_warnings():
        # Overflow and "optimal order is the largest alpha" only mean that the bound is loose.
        warnings.simplefilter("ignore")
        bound = _renyi(events, delta)
        if accountant == "prv":
            bound = min(bound, _numerical(events, delta, bound))
    return max(bound, 0.0)


def _renyi(events: tuple[_Event, ...], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(steps * _renyi_curve(noise, rate) for noise, rate, steps in events)
    value, _ = get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)
    return math.inf if math.isnan(value) else float(value)


@lru_cache(maxsize=1024)
def _renyi_curve(noise: float, rate: float) -> npt.NDArray[np.float64]:
    """Return a bound on one step's Rényi divergence at every order, infinite where there is none.

    ``(order - 1) * divergence`` is convex in the order and 0 at 1, so that a straight line between
    two knots lies above it.
    """
    import numpy as np
    from opacus.accountants.analysis.rdp import compute_rdp

    def moment(order: float) -> float:
        try:
            value = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order))
        except (ValueError, OverflowError, ZeroDivisionError):
            return math.inf
        return (order - 1) * max(float(value), 0.0)

    moments = np.interp(_ORDERS, (1, *_KNOTS), (0, *map(moment, _KNOTS)))
    moments[np.isnan(moments)] = math.inf
    curve: npt.NDArray[np.float64] = moments / (np.array(_ORDERS) - 1)
    return curve


def _numerical(events: tuple[_Event, ...], delta: float, bound: float) -> float:
    """Return the PRV accountant's upper bound, or infinity where it has none to give.

    Its error grows with ``bound``, half a percent of it, because the cost grows with
    bound / error; it is part of what is returned.
    """
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    delta_error, steps = delta / 1000, sum(event[2] for event in events)
    # The domain of Opacus' compute_safe_domain_size (2106.02848, remark 5.6), which takes seconds
    # because it computes a hundred orders anew for every event.
    tails = [_renyi(((*event[:2], 1),), delta_error / (8 * steps)) for event in events]
    reach = max(_renyi(events, delta_error / 4), *tails) + 3
    if delta < _MIN_DELTA or not math.isfinite(reach):
        return math.inf
    resolution = math.sqrt(steps * math.log(12 / delta_error) / 2)
    error = max(0.001, 0.005 * bound, 2 * reach * resolution * len(events) / _MAX_POINTS)
    if error > min(0.5, 0.1 * max(bound, 0.1)):
        return math.inf

    class OnDomain(PRVAccountant):  # type: ignore[misc]  # Opacus is not typed
        def _get_domain(self, **_: object) -> Domain:
            return Domain.create_aligned(-reach, reach, error / resolution)

    numerical = OnDomain()
    numerical.history = list(events)
    try:
        value = numerical.get_epsilon(delta, eps_error=error, delta_error=delta_error)
    except (RuntimeError, ValueError, OverflowError, IndexError):
        return math.inf
    return float(value) if math.isfinite(value) else math.inf
