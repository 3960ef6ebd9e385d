"""What rounds, runs, forks, merges and client-level rounds add up to, against closed forms."""

import math

import pytest
from scipy import optimize, stats

from orchestrator.epsilons import epsilon_by
from strategies.spends import ClientLevel

DELTA = 1e-5
NOISE = 4.0


def exact(times, noise=NOISE):
    """Return the epsilon of so many Gaussian mechanisms without sampling (1805.06530, thm 8)."""
    mu = math.sqrt(times) / noise

    def excess(eps):
        tail = stats.norm.cdf(-mu / 2 - eps / mu)
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * tail - DELTA

    return optimize.brentq(excess, 0, 300)


def round_of(*digests, noise=NOISE, steps=1, unit="example", adjacency="add-remove"):
    """Return the recipe of a round with an update of one population by each digest."""
    parameters = {"noise_multiplier": noise, "sample_rate": 1.0, "steps": float(steps)}
    spend = {"mechanism": "gaussian", "unit": unit, "adjacency": adjacency}
    leaves = [
        {
            "digest": digest,
            "population": "ward",
            "public": False,
            "spends": [{**spend, "parameters": parameters}],
        }
        for digest in digests
    ]
    return {"privacy": {"delta": DELTA}, "updates": leaves}


def total(recipes):
    found = epsilon_by(recipes, lambda leaf: (leaf["population"],))
    return {(one.unit, one.adjacency): one.epsilon for one in found.values()}


MERGE = {"privacy": None, "updates": []}
TRUNK = [round_of("t1"), round_of("t2")]
LEFT, RIGHT = [round_of("l1"), round_of("l2", "l3")], [round_of("r1")]


@pytest.mark.parametrize(
    ("recipes", "times"),
    [
        pytest.param(TRUNK, 2, id="rounds"),
        pytest.param([*TRUNK, *LEFT], 5, id="a run that goes on from another"),
        pytest.param([*TRUNK, *TRUNK, *LEFT, *RIGHT, MERGE], 6, id="a fork, merged"),
        pytest.param([round_of("s", steps=7), *RIGHT], 8, id="steps"),
    ],
)
def test_what_a_version_inherits_adds_up_to_the_closed_form(recipes, times):
    found = total(recipes)[("example", "add-remove")]

    assert exact(times) <= found <= 1.01 * exact(times)


def test_noise_that_changes_from_run_to_run_adds_up_by_its_inverse_squares():
    recipes = [round_of("a", noise=3.0), round_of("b", noise=4.0), round_of("c", noise=6.0)]
    together = (3.0**-2 + 4.0**-2 + 6.0**-2) ** -0.5

    found = total(recipes)[("example", "add-remove")]

    assert exact(1, together) <= found <= 1.01 * exact(1, together)


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_rounds_of_whole_clients_add_up_and_stay_apart_from_those_of_examples(quantile):
    spend = ClientLevel(clip=0.1, noise_multiplier=NOISE, cohort=8, quantile=quantile).spend
    rounds = [
        round_of(f"c{n}", noise=spend.parameters["noise_multiplier"], unit=spend.unit)
        | {"privacy": {"delta": DELTA}}
        for n in range(3)
    ]
    for one in rounds:
        one["updates"][0]["spends"][0]["adjacency"] = spend.adjacency

    found = total([*TRUNK, *rounds])

    assert exact(3) <= found[("client", "zero-out")] <= 1.01 * exact(3)
    assert exact(2) <= found[("example", "add-remove")] <= 1.01 * exact(2)
