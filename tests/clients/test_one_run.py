"""What right guesses prove, against published and hand-computed values."""

import math

import pytest
from scipy.stats import binom

from clients.one_run import BadGuesses, Guesses, lower_bound, p_value


@pytest.mark.parametrize(
    ("guesses", "delta", "published"),
    [
        (Guesses(1000, 100, 75), 1e-4, 0.673),  # appendix D
        (Guesses(100_000, 1510, 1439), 1e-5, 2.675),  # section 7
    ],
)
def test_the_paper_s_own_numbers_come_out(guesses, delta, published):
    assert lower_bound(guesses, delta) == pytest.approx(published, abs=1e-3)


def test_without_delta_all_right_proves_what_coins_would_have_to_be():
    # q^r = 5 % at q = e^eps / (1 + e^eps)
    q = 0.05 ** (1 / 200)
    assert lower_bound(Guesses(1000, 200, 200), 0.0) == pytest.approx(math.log(q / (1 - q)))


def test_delta_excuses_as_much_as_the_theorem_says():
    # r = 2, v = 1, q = 1/2: P[W >= 1] = 3/4, and P[W = 0] / 1 = 1/4 times 2 m delta
    assert p_value(Guesses(4, 2, 1), 0.0, 0.05) == pytest.approx(0.75 + 8 * 0.05 * 0.25)
    # r = v = 2: P[W = 2] = 1/4; P[W = 1] / 1 = 1/2 is more than P[W <= 1] / 2 = 3/8
    assert p_value(Guesses(4, 2, 2), 0.0, 0.05) == pytest.approx(0.25 + 8 * 0.05 * 0.5)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 4.0, 40.0])
def test_tails_are_those_of_the_binomial_distribution_where_they_are_tiny_too(epsilon):
    q = 1 / (1 + math.exp(-epsilon))
    for right in (0, 150, 290, 300):
        found = p_value(Guesses(1000, 300, right), epsilon, 0.0)
        assert found == pytest.approx(float(binom.sf(right - 1, 300, q)), rel=1e-9)


def test_more_right_guesses_prove_no_less():
    bounds = [lower_bound(Guesses(1000, 200, right), 1e-5) for right in range(100, 201, 5)]
    assert bounds[0] == 0.0
    assert bounds == sorted(bounds)
    assert len(set(bounds[6:])) == len(bounds[6:])


@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("right", [60, 190, 199, 200])
def test_more_epsilon_explains_no_less_as_long_as_it_refutes_anything(right, delta):
    chances = [p_value(Guesses(1000, 200, right), e / 25, delta) for e in range(300)]
    first = next((n for n, chance in enumerate(chances) if chance > 0.5), len(chances))
    assert chances[:first] == sorted(chances[:first])
    assert all(chance > 0.5 for chance in chances[first:])


def test_more_delta_explains_no_less():
    guesses = Guesses(1000, 200, 190)
    by_delta = [lower_bound(guesses, d) for d in (5e-4, 1e-4, 1e-5, 0.0)]
    assert by_delta == sorted(by_delta)


def test_a_claim_below_the_bound_has_a_chance_below_the_confidence():
    guesses = Guesses(1000, 200, 180)
    bound = lower_bound(guesses, 1e-5, 0.99)
    assert p_value(guesses, bound - 1e-6, 1e-5) < 0.01 <= p_value(guesses, bound + 1e-6, 1e-5)


@pytest.mark.parametrize(
    ("numbers", "delta", "confidence", "said"),
    [
        ((10, 11, 3), 0.0, 0.95, "got 10 canaries, 11 made, 3 right"),
        ((10, 5, 6), 0.0, 0.95, "6 right"),
        ((10, 0, 0), 0.0, 0.95, "0 made"),
        ((10, 5, 4), 1.5, 0.95, "delta"),
        ((10, 5, 4), 0.0, 1.0, "confidence"),
    ],
)
def test_what_proves_nothing_is_refused(numbers, delta, confidence, said):
    with pytest.raises(BadGuesses, match=said):
        lower_bound(Guesses(*numbers), delta, confidence)
