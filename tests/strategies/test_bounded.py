"""One client changes the sum by a bounded norm, and the noise and the denominator are fixed."""

import math

import pytest
import torch

from strategies.base import Update
from strategies.bounded import noised_mean, shortened
from strategies.spends import ClientLevel, PrivacySpend
from strategies.tensors import BadUpdate

SENT = {"x": torch.tensor([1.0, 1.0]), "y": torch.tensor([2.0])}


def silent(name, total, deviation):
    return total


@pytest.fixture
def noise():
    """Return what puts normal noise into a total, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)

    def put(name, total, deviation):
        normals = torch.randn(total.shape, generator=generator, dtype=torch.float64)
        return total + deviation * normals

    return put


def update(client, x=(1.0, 1.0), y=(2.0,)):
    return Update(client, 1, "", {"x": torch.tensor(x), "y": torch.tensor(y)}, 7)


def mean(updates, terms, mask=None, noise=silent):
    return noised_mean(updates, SENT, mask or {}, terms, noise).update


def total(updates, clip=5.0):
    """The sum of the shortened changes: the mean's change, times the denominator."""
    made = mean(updates, ClientLevel(clip, 1.0, 1))
    return torch.cat([made.tensors[n].double() - SENT[n].double() for n in ("x", "y")])


def test_changes_are_shortened_over_all_tensors_together_and_divided_by_the_denominator():
    # a moves by (6, 0, 8), of norm 10, and counts as (3, 0, 4); b moves by (0, 3, 0), within 5
    updates = [update("a", (7.0, 1.0), (10.0,)), update("b", (1.0, 4.0))]

    made = mean(updates, ClientLevel(clip=5.0, noise_multiplier=1.0, cohort=2))

    assert made.tensors["x"].tolist() == [1 + 3 / 2, 1 + 3 / 2]
    assert made.tensors["y"].tolist() == [2 + 4 / 2]


def test_one_client_more_or_less_changes_the_sum_by_at_most_the_clip_and_another_by_twice_that():
    others = [update("b", (0.0, 3.0)), update("c", (9.0, -9.0))]
    far, opposite = update("a", (1e6, 1.0)), update("a", (-1e6, 1.0))
    without = total(others)

    assert float((total([far, *others]) - without).norm()) == pytest.approx(5.0)
    assert float((total([far, *others]) - total([opposite, *others])).norm()) == pytest.approx(10.0)
    small = update("a", (1.5, 1.0))
    assert float((total([small, *others]) - without).norm()) == pytest.approx(0.5)


def test_what_a_client_says_of_its_examples_or_its_weight_counts_for_nothing():
    honest = total([update("a", (4.0, 1.0))])
    loud = Update("a", 1, "", update("a", (4.0, 1.0)).tensors, 10**9, weight=50.0, declared=9.0)

    assert torch.equal(total([loud]), honest)


def test_the_denominator_is_the_expected_number_whoever_answers():
    terms = ClientLevel(clip=5.0, noise_multiplier=1.0, cohort=4)
    answered = [update("a", (3.0, 1.0)), update("b", (3.0, 1.0))]

    assert mean(answered, terms).tensors["x"].tolist() == [1 + 2 * 2 / 4, 1.0]
    assert mean(answered[:1], terms).tensors["x"].tolist() == [1 + 2 / 4, 1.0]
    assert torch.equal(mean([], terms).tensors["x"], SENT["x"])


def test_the_noise_has_the_size_that_the_spend_says_however_many_answer(noise):
    terms = ClientLevel(clip=0.5, noise_multiplier=3.0, cohort=10)
    like = {"x": torch.zeros(40_000)}

    for updates in ([], [Update("a", 1, "", {"x": torch.zeros(40_000)}, 1)]):
        drawn = noised_mean(updates, like, {}, terms, noise).update.tensors["x"].double()
        # the variance of 40,000 draws is within 3 % of its expectation, at 4 standard deviations
        assert float(drawn.square().mean()) == pytest.approx((3.0 * 0.5 / 10) ** 2, rel=0.03)
        assert abs(float(drawn.mean())) < 4 * 0.15 / math.sqrt(40_000)
    assert terms.noise_std == pytest.approx(0.15)
    assert terms.spend.parameters == {"noise_multiplier": 3.0, "sample_rate": 1.0, "steps": 1.0}


def test_masked_entries_stay_as_they_are_whatever_comes_and_take_no_room_in_the_norm():
    mask = {"x": torch.tensor([1.0, 0.0])}
    terms = ClientLevel(clip=5.0, noise_multiplier=1.0, cohort=1)

    def ones(name, total, deviation):
        return total + deviation

    made = mean([update("a", (4.0, 1e9))], terms, mask, ones)

    assert made.tensors["x"].tolist() == [4 + 5.0, 1.0]
    assert made.tensors["y"].tolist() == [2 + 5.0]


def test_a_client_that_is_there_twice_is_refused():
    with pytest.raises(BadUpdate, match="'a' is in one sum twice"):
        total([update("a"), update("b"), update("a")])


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"x": torch.ones(2)}, "has no 'y'"),
        ({"x": torch.ones(2), "y": torch.ones(1), "z": torch.ones(1)}, "'z'"),
        ({"x": torch.ones(3), "y": torch.ones(1)}, "shape"),
        ({"x": torch.tensor([1.0, torch.nan]), "y": torch.ones(1)}, "not finite"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(tensors, reason):
    with pytest.raises(BadUpdate, match=reason):
        total([Update("a", 1, "", tensors, 1)])


def test_an_honest_client_sends_what_the_coordinator_would_make_of_it():
    trained = update("a", (7.0, 1.0), (10.0,)).tensors

    sent = shortened(trained, SENT, 5.0)

    assert {n: t.tolist() for n, t in sent.items()} == {"x": [4.0, 1.0], "y": [6.0]}
    assert all(torch.equal(shortened(sent, SENT, 5.0)[n], t) for n, t in sent.items())


def test_training_that_diverged_is_sent_as_no_change():
    sent = shortened({"x": torch.tensor([torch.inf, 1.0]), "y": torch.ones(1)}, SENT, 5.0)

    assert all(torch.equal(sent[name], SENT[name]) for name in SENT)


def test_values_are_kept_in_the_dtype_that_was_sent():
    like = {"x": torch.ones(3, dtype=torch.bfloat16)}
    sent = [Update("a", 1, "", {"x": torch.full((3,), 2.0, dtype=torch.bfloat16)}, 1)]

    made = noised_mean(sent, like, {}, ClientLevel(9.0, 1.0, 1), silent).update

    assert made.tensors["x"].dtype == torch.bfloat16
    assert made.tensors["x"].tolist() == [2.0] * 3


def test_a_round_costs_a_client_one_gaussian_sum_without_subsampling():
    assert ClientLevel(1.0, 2.5, 8).spend == PrivacySpend(
        "gaussian",
        "client",
        "zero-out",
        {"noise_multiplier": 2.5, "sample_rate": 1.0, "steps": 1.0},
    )


# --- the clip that moves ----------------------------------------------------------------------


def moving(quantile=0.5, clip=5.0, noise=1.0, cohort=4):
    return ClientLevel(clip, noise, cohort, quantile)


def test_the_share_within_the_clip_is_counted_from_the_middle_so_that_who_is_absent_counts_half():
    near, edge, far = update("a", (2.0, 1.0)), update("b", (6.0, 1.0)), update("c", (6.1, 1.0))

    made = noised_mean([near, edge, far], SENT, {}, moving(), silent)

    assert made.share == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_the_clip_moves_towards_the_quantile_and_stays_there():
    terms, norms = moving(quantile=0.8, clip=50.0, cohort=10), range(1, 11)
    people = [update(f"{i}", (1.0 + i, 1.0)) for i in norms]
    for _ in range(300):
        terms = terms.after(noised_mean(people, SENT, {}, terms, silent).share)

    assert 7.5 < terms.clip < 9  # between the eighth of ten norms and the ninth
    assert moving(clip=2.0).after(0.5).clip == 2.0
    assert moving(clip=2.0).after(1.0).clip == pytest.approx(2.0 * math.exp(-0.1))


@pytest.mark.parametrize(("noise", "cohort"), [(1.0, 100), (5.0, 4), (0.3, 1000)])
def test_sum_and_count_together_cost_what_the_sum_alone_would(noise, cohort):
    """One client moves (sum / its noise, count / its noise) by 1 / noise_multiplier in all."""
    fixed, terms = ClientLevel(2.0, noise, cohort), moving(0.5, 2.0, noise, cohort)

    both = math.hypot(terms.clip / terms.sum_std, 0.5 / terms.count_std)

    assert both == pytest.approx(1 / noise)
    assert terms.spend == fixed.spend
    assert 1 < terms.sum_std / fixed.sum_std < 1.16
    assert fixed.clip / fixed.sum_std == pytest.approx(1 / noise)


def test_the_count_has_the_noise_that_it_says(noise):
    terms = moving(noise=3.0, cohort=10)

    shares = [noised_mean([], SENT, {}, terms, noise).share for _ in range(2000)]
    spread = torch.tensor(shares, dtype=torch.float64).std()
    assert float(spread) == pytest.approx(3.0 / 10, rel=0.07)  # 4 standard deviations


def test_without_a_quantile_no_count_is_told():
    assert math.isnan(noised_mean([update("a")], SENT, {}, ClientLevel(5.0, 1.0, 1), silent).share)
    assert ClientLevel(5.0, 1.0, 1).after(math.nan).clip == 5.0


def test_a_client_cuts_nothing_itself_where_it_is_counted_who_is_within():
    assert ClientLevel(5.0, 1.0, 1).bound == 5.0
    trained = update("a", (99.0, 1.0)).tensors
    sent = shortened(trained, SENT, moving().bound)
    assert all(torch.equal(sent[n], trained[n]) for n in trained)
