"""Epsilon and noise against closed forms, Opacus and each other."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import integrate, optimize, stats

from clients.accounting import (
    BudgetSpent,
    IncomposableSpends,
    approximate_epsilon,
    epsilon,
    noise_for,
)
from strategies.spends import PrivacySpend

DELTA = 1e-5
PEER = Path(__file__).with_name("dp_accounting.json").read_text().splitlines()
BOTH = pytest.mark.parametrize("accountant", ["prv", "rdp"])


def spend(noise, rate, steps, unit="example", mechanism="gaussian", adjacency="add-remove"):
    parameters = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps}
    return PrivacySpend(mechanism, unit, adjacency, parameters)


def gaussian_epsilon(noise, steps, delta):
    """Return the exact epsilon of a Gaussian mechanism without subsampling (1805.06530, thm 8)."""
    mu = math.sqrt(steps) / noise

    def excess(eps):
        tail = stats.norm.cdf(-mu / 2 - eps / mu)
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * tail - delta

    return optimize.brentq(excess, 0, 300)


def subsampled_epsilon(noise, rate, delta):
    """Return the exact epsilon of one subsampled step, by integrating the definition."""

    def excess(eps):
        def gap(x):
            with_example = rate * stats.norm.pdf(x, 1, noise) + (1 - rate) * stats.norm.pdf(
                x, 0, noise
            )
            return max(with_example - math.exp(eps) * stats.norm.pdf(x, 0, noise), 0)

        found, _ = integrate.quad(gap, -10 * noise, 1 + 10 * noise, limit=500)
        return found - delta

    return optimize.brentq(excess, 1e-6, 50)


@BOTH
def test_nothing_spent_is_zero(accountant):
    assert epsilon([], DELTA, accountant) == 0.0


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 10), (1.0, 1), (20.0, 100), (0.7, 3)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_is_just_above_the_exact_one_without_subsampling(noise, steps, delta):
    exact = gaussian_epsilon(noise, steps, delta)
    assert exact <= epsilon([spend(noise, 1.0, steps)], delta) <= 1.02 * exact
    assert exact <= epsilon([spend(noise, 1.0, steps)], delta, "rdp") <= 1.25 * exact


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.6, 0.5), (2.0, 0.9)])
def test_epsilon_is_just_above_the_exact_one_of_a_subsampled_step(noise, rate):
    exact = subsampled_epsilon(noise, rate, DELTA)
    assert exact <= epsilon([spend(noise, rate, 1)], DELTA) <= 1.02 * exact
    assert exact <= epsilon([spend(noise, rate, 1)], DELTA, "rdp")


@pytest.mark.parametrize(("kind", "accountant"), [(PRVAccountant, "prv"), (RDPAccountant, "rdp")])
def test_epsilon_agrees_with_opacus(kind, accountant):
    history = [(1.0, 0.01, 400), (1.3, 0.02, 200)]
    peer = kind()
    peer.history = list(history)
    found = epsilon([spend(*event) for event in history], DELTA, accountant)
    assert found == pytest.approx(peer.get_epsilon(DELTA), rel=0.01)


@pytest.mark.parametrize(
    "peer",
    [json.loads(line) for line in PEER],
    ids=lambda one: repr(one["spends"]).replace(" ", ""),
)
def test_epsilon_agrees_with_google_s_accountants(peer):
    """With what ``benchmarks/accountants.py`` wrote down that dp-accounting said."""
    spends, delta = [spend(*event) for event in peer["spends"]], peer["delta"]
    exact = peer["pld"]  # an upper bound too, and a very near one

    assert exact <= epsilon(spends, delta) <= 1.01 * exact + 0.001
    assert exact <= epsilon(spends, delta, "rdp") <= 1.03 * peer["rdp"]


def test_the_central_limit_s_epsilon_is_exact_without_sampling():
    spends = [spend(5.0, 1.0, 3), spend(8.0, 1.0, 6)]
    together = 1 / math.sqrt(3 / 25 + 6 / 64)
    assert approximate_epsilon(spends, DELTA) == pytest.approx(gaussian_epsilon(together, 1, DELTA))


def test_the_central_limit_s_epsilon_is_too_low_for_few_steps_and_right_for_many():
    few, many = spend(0.6, 0.01, 200), spend(20.0, 0.05, 10**5)
    assert approximate_epsilon([few], DELTA) < 0.6 * epsilon([few], DELTA)
    assert approximate_epsilon([many], DELTA) == pytest.approx(epsilon([many], DELTA), rel=0.01)


@pytest.mark.parametrize(
    ("event", "value"),
    [((1e3, 0.01, 1), 0.0), ((0.01, 0.5, 10), math.inf), ((0.1, 1, 9), math.inf)],
)
def test_the_central_limit_s_epsilon_has_its_ends(event, value):
    assert approximate_epsilon([spend(*event)], DELTA) == value
    assert approximate_epsilon([], DELTA) == 0.0


def test_the_central_limit_judges_nothing():
    with pytest.raises(ValueError, match="accountant must be prv or rdp, got 'gdp'"):
        epsilon([spend(0.6, 0.01, 200)], DELTA, "gdp")


def test_the_numerical_accountant_is_tighter():
    spends = [spend(1.0, 0.01, 1000)]
    assert epsilon(spends, DELTA, "prv") < 0.9 * epsilon(spends, DELTA, "rdp")


@BOTH
def test_rounds_compose_to_the_epsilon_of_their_steps_together(accountant):
    rounds = [spend(1.0, 0.02, 10) for _ in range(5)]
    assert epsilon(rounds, DELTA, accountant) == epsilon([spend(1.0, 0.02, 50)], DELTA, accountant)


@BOTH
def test_the_order_of_spends_does_not_matter(accountant):
    spends = [spend(1.0, 0.02, 10), spend(0.8, 0.01, 20), spend(1.0, 0.02, 5)]
    there, back = (epsilon(x, DELTA, accountant) for x in (spends, reversed(spends)))
    assert there == back


@BOTH
@pytest.mark.parametrize("more", [(2.0, 0.5, 1), (1.0, 0.02, 3), (9.0, 1.0, 2)])
def test_spending_more_never_costs_less(more, accountant):
    one = spend(2.0, 0.5, 4)
    both = epsilon([one, spend(*more)], DELTA, accountant)
    assert both > epsilon([one], DELTA, accountant)


@pytest.mark.parametrize(
    "event",
    [(0.3, 0.5, 1000), (1e-3, 0.1, 10), (1.0, 0.5, 10**6)],
    ids=["large domain", "almost no noise", "a million steps"],
)
def test_a_hopeless_case_falls_back_to_the_cheap_bound_at_once(event):
    found = epsilon([spend(*event)], DELTA)
    assert found == epsilon([spend(*event)], DELTA, "rdp") > 1000


def test_a_tiny_delta_falls_back_to_the_cheap_bound():
    assert epsilon([spend(2.0, 0.1, 10)], 1e-13) == epsilon([spend(2.0, 0.1, 10)], 1e-13, "rdp")


def test_a_long_mixed_history_is_still_bounded():
    spends = [spend(0.8 + 0.1 * i, 0.01, 50) for i in range(6)]
    prv, rdp = (epsilon(spends, DELTA, accountant) for accountant in ("prv", "rdp"))
    assert epsilon(spends[:1], DELTA) < prv <= rdp


def test_spends_of_different_units_are_never_added():
    with pytest.raises(IncomposableSpends, match="patient_id"):
        epsilon([spend(1.0, 0.1, 1), spend(1.0, 0.1, 1, unit="patient_id")], DELTA)


@BOTH
def test_a_client_that_is_zeroed_out_costs_what_one_that_is_left_out_does(accountant):
    there, gone = (spend(4.0, 1.0, 5, "client", adjacency=a) for a in ("zero-out", "add-remove"))
    assert epsilon([there], DELTA, accountant) == epsilon([gone], DELTA, accountant)
    with pytest.raises(IncomposableSpends, match="zero-out"):
        epsilon([there, gone], DELTA, accountant)


def test_sampling_that_everybody_knows_of_is_not_accounted_as_secret():
    with pytest.raises(IncomposableSpends, match="sampling gains nothing"):
        epsilon([spend(4.0, 0.1, 5, "client", adjacency="zero-out")], DELTA)


@pytest.mark.parametrize(
    "unknown", [{"mechanism": "laplace"}, {"adjacency": "replace"}], ids=lambda x: next(iter(x))
)
def test_an_unknown_kind_of_spend_is_refused(unknown):
    with pytest.raises(IncomposableSpends, match=next(iter(unknown.values()))):
        epsilon([spend(1.0, 0.1, 1, **unknown)], DELTA)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ((0.0, 0.1, 1), "noise_multiplier"),
        ((1.0, 0.0, 1), "sample_rate"),
        ((1.0, 1.5, 1), "sample_rate"),
        ((1.0, 0.1, 0), "steps"),
        ((1.0, 0.1, 1.5), "steps"),
        ((float("nan"), 0.1, 1), "noise_multiplier"),
    ],
)
def test_a_spend_out_of_range_is_refused(event, message):
    with pytest.raises(ValueError, match=message):
        epsilon([spend(*event)], DELTA)


def test_a_spend_without_its_parameters_is_refused():
    with pytest.raises(ValueError, match="needs the parameter 'sample_rate'"):
        epsilon([PrivacySpend("gaussian", "example", "add-remove", {"noise_multiplier": 1})], DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_out_of_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be > 0 and < 1"):
        epsilon([], delta)


@BOTH
@pytest.mark.parametrize(
    ("budget", "rate", "steps"),
    [(8.0, 0.016, 60), (1.0, 0.1, 10), (0.05, 0.01, 20), (3.0, 1.0, 9)],
)
def test_the_noise_is_the_least_that_keeps_to_the_budget(accountant, budget, rate, steps):
    noise = noise_for(budget, DELTA, sample_rate=rate, steps=steps, accountant=accountant)
    assert epsilon([spend(noise, rate, steps)], DELTA, accountant) <= budget
    assert epsilon([spend(0.997 * noise, rate, steps)], DELTA, accountant) > budget
    assert noise == round(noise, 4)


def test_the_noise_leaves_room_for_what_was_spent():
    history = [spend(3.0, 1.0, 2), spend(2.0, 0.5, 3)]
    noise = noise_for(4.0, DELTA, sample_rate=0.5, steps=5, history=history)
    assert noise > noise_for(4.0, DELTA, sample_rate=0.5, steps=5)
    assert 0.99 * 4 < epsilon([*history, spend(noise, 0.5, 5)], DELTA) <= 4


def test_a_smaller_budget_needs_more_noise():
    noises = [noise_for(e, DELTA, sample_rate=0.5, steps=5) for e in (8.0, 2.0)]
    assert noises[0] < noises[1]


def test_a_huge_budget_needs_the_least_noise_there_is():
    assert noise_for(1e7, DELTA, sample_rate=0.01, steps=1) == 0.01


@pytest.mark.parametrize("budget", [1.0, 1e-4])
def test_a_budget_that_cannot_be_kept_is_refused(budget):
    history = [spend(1.0, 1.0, 1)] if budget == 1 else []
    with pytest.raises(BudgetSpent, match=f"of {budget:g} .* is spent, and no noise leaves room"):
        noise_for(budget, DELTA, sample_rate=0.02, steps=100, history=history)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"delta": 1.0}, "delta"),
        ({"epsilon": 0.0}, "epsilon"),
    ],
)
def test_a_plan_out_of_range_is_refused(wrong, message):
    plan = {"epsilon": 1.0, "delta": DELTA, "sample_rate": 0.1, "steps": 1}
    with pytest.raises(ValueError, match=f"{message} must be"):
        noise_for(**{**plan, **wrong})


plans = st.fixed_dictionaries(
    {
        "epsilon": st.floats(0.2, 16),
        "delta": st.floats(-7, -3).map(lambda power: 10**power),
        "sample_rate": st.floats(-3, 0).map(lambda power: 10**power),
        "steps": st.floats(0, 3).map(lambda power: int(10**power)),
        "history": st.lists(
            st.builds(spend, st.floats(2, 9), st.floats(0.01, 0.2), st.integers(1, 30)), max_size=1
        ),
        "accountant": st.sampled_from(["prv", "rdp"]),
    }
)


def check_calibration(plan):
    """Check that calibrated noise keeps to the budget, and that a hair less of it would not."""
    try:
        noise = noise_for(**plan)
    except BudgetSpent:
        assume(False)
    target, by = plan["epsilon"], plan["accountant"]

    def used(noise):
        new = spend(noise, plan["sample_rate"], plan["steps"])
        return epsilon([*plan["history"], new], plan["delta"], by)

    assert used(noise) <= target
    assert used(noise) >= 0.99 * target or noise == 0.01 or used(0.998 * noise - 1e-4) > target


@settings(max_examples=8, deadline=None)
@given(plans)
def test_calibrated_noise_spends_the_budget_and_no_more(plan):
    check_calibration(plan)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=int(os.environ.get("WEFT_SETTINGS", "60")), deadline=None)
@given(plans)
def test_calibrated_noise_spends_the_budget_and_no_more_in_many_settings(plan):
    # WEFT_SETTINGS=1000 takes a quarter of an hour
    check_calibration(plan)
