import math
import random

import pytest

from strategies.pooled import Sums, kinds, scores_of, sums_std, weighted


def told(count, loss, right, noise=1.0, bound=2.0):
    """Return the sums of so many units of one loss, of which a share is right."""
    sums = {
        "count": count,
        "loss": count * (2 * loss / bound - 1),
        "accuracy": count * (2 * right - 1),
    }
    return Sums(sums, noise, bound)


def test_sums_are_pooled_as_if_all_units_were_at_one_client():
    found = scores_of([told(30, 1.0, 0.9), told(10, 0.2, 0.5)])
    assert found["accuracy"].value == pytest.approx((27 + 5) / 40)
    assert found["loss"].value == pytest.approx((30 * 1.0 + 10 * 0.2) / 40)


def test_a_score_stays_what_a_score_can_be():
    found = scores_of([Sums({"count": 10.0, "loss": -40.0, "accuracy": 60.0}, 1.0, 2.0)])
    assert (found["accuracy"].value, found["loss"].value) == (1.0, 0.0)


def test_sums_that_may_be_all_noise_are_no_score():
    assert scores_of([Sums({"count": 1.5, "loss": 1.0, "accuracy": 1.0}, 1.0, 2.0)]) == {}


def test_the_standard_error_is_that_of_scores_made_again_with_other_noise():
    generator, std = random.Random(3), sums_std(2.0, 3)
    exact = [told(300, 0.4, 0.9), told(200, 0.6, 0.8)]
    drawn = []
    for _ in range(3000):
        again = [
            Sums({k: v + generator.gauss(0, std) for k, v in one.sums.items()}, 2.0, one.bound)
            for one in exact
        ]
        drawn.append(scores_of(again))
    stated = scores_of([Sums(one.sums, 2.0, one.bound) for one in exact])
    for kind in ("accuracy", "loss"):
        values = [one[kind].value for one in drawn]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert stated[kind].error == pytest.approx(spread, rel=0.06)
        assert mean == pytest.approx(stated[kind].value, abs=4 * spread / math.sqrt(3000))


def test_a_causal_model_has_no_accuracy():
    assert kinds("causal-lm") == ("count", "loss")
    assert sums_std(3.0, 2) == pytest.approx(3.0 * math.sqrt(2))


def test_exact_scores_count_by_their_examples_where_they_are():
    found = weighted(
        [(3, {"accuracy": 1.0, "loss": 0.1}), (1, {"accuracy": 0.0}), (0, {"f1": 1.0})]
    )
    assert found == {"accuracy": 0.75, "loss": pytest.approx(0.1)}
