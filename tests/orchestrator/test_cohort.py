"""Whom a round asks: by seed, share, label, weight and history."""

from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.cohort import (
    asked_a_round,
    asked_next,
    cohort_of,
    draw,
    goal,
    quarantined,
    quorum,
    resting,
    roster,
)
from orchestrator.history import Asked, Faults, History, Open, Times
from orchestrator.policy import Cohort, Staleness, share

TEN = tuple(f"c{i}" for i in range(10))
FEDBUFF = {"buffer": 2, "concurrency": 3}


@pytest.fixture
def known(make_plan):
    """Return a function that makes a roster of clients with these sizes and labels."""

    def make(sizes, where=None, **labels):
        people = [
            replace(p, num_examples=size, labels={k: v[i] for k, v in labels.items()})
            for i, (p, size) in enumerate(
                zip(make_plan(clients=tuple(sizes)).participants, sizes.values(), strict=True)
            )
        ]
        return roster(people, Cohort(weight="examples", where=where or {}))

    return make


@pytest.fixture
def drawn(make_plan):
    """Return a function that draws the cohort of the round after ``history``."""

    def make(history=None, clients=TEN, unreachable=(), **changes):
        plan = make_plan(clients=clients, **changes)
        people = roster(plan.participants, plan.config.cohort)
        return cohort_of(plan, people, history or History(), unreachable)

    return make


def test_a_cohort_is_sorted_without_repeats_and_of_the_asked_size(drawn):
    cohort = drawn(cohort=7)

    assert list(cohort) == sorted(set(cohort))
    assert len(cohort) == 7
    assert set(cohort) <= set(TEN)


def test_a_cohort_depends_on_seed_and_round_and_not_on_the_order_of_names(drawn):
    assert drawn(cohort=7) == drawn(cohort=7, clients=TEN[::-1])
    assert drawn(cohort=7) != drawn(History(round=1), cohort=7)
    assert drawn(cohort=7) != drawn(cohort=7, seed=1)


@pytest.mark.parametrize("cohort", [None, 10, 99, 1.0])
def test_everybody_is_asked_where_the_cohort_is_not_smaller(drawn, cohort):
    assert drawn(cohort=cohort) == TEN


def test_over_many_rounds_every_client_is_asked_about_equally_often(known):
    people = known(dict.fromkeys(TEN, 1))

    asked = Counter(n for seed in range(1000) for n in draw(people, 3, seed))

    assert min(asked.values()) > 240  # 300 on average, standard deviation 14.5
    assert max(asked.values()) < 360


def test_larger_clients_are_drawn_as_if_one_by_one_in_proportion(known):
    people = known({"a": 1, "b": 2, "c": 3})
    pairs = Counter(draw(people, 2, seed) for seed in range(6000))

    # P(a, b) = 1/6 * 2/5 + 2/6 * 1/4, and so on; three standard deviations are 0.019
    for pair, chance in {("a", "b"): 9 / 60, ("a", "c"): 16 / 60, ("b", "c"): 35 / 60}.items():
        assert pairs[pair] / 6000 == pytest.approx(chance, abs=0.02)


def test_a_client_without_examples_and_one_left_out_are_never_drawn(known):
    people = known({"a": 0, "b": 2, "c": 3})

    assert draw(people, 3, seed=0) == ("b", "c")
    assert draw(people, 3, seed=0, without=["b", "nobody"]) == ("c",)


def test_a_label_narrows_who_may_be_asked(known):
    people = known(
        {"a": 1, "b": 1, "c": 1}, {"ward": "n"}, ward=["n", "s", "n"], gpu=["y", "y", ""]
    )

    assert people.names == ("a", "c")


@pytest.mark.parametrize(
    ("cohort", "wanted", "asked"),
    [
        (8, 8, 8),
        (0.25, 3, 3),  # 2.5, rounded up
        ({"size": 8, "over_provision": 0.25}, 8, 10),
        ({"size": 9, "over_provision": 0.5}, 9, 10),  # no more than there are
        ({"fraction": 0.7}, 7, 7),  # 7.000000000000001 in floating point
        (None, 10, 10),
    ],
)
def test_a_round_wants_so_many_updates_and_asks_so_many_clients(make_plan, cohort, wanted, asked):
    plan = make_plan(clients=TEN, cohort=cohort)

    assert goal(plan.config, 10) == wanted
    assert asked_a_round(plan) == asked
    assert share(0.7, 10) == 7


@pytest.mark.parametrize(
    ("given", "needed"), [(None, 1), (6, 6), (0.8, 7), (1.0, 8), (0.01, 1), (1, 1)]
)
def test_a_quorum_is_a_number_or_a_share_of_the_goal(make_plan, given, needed):
    assert quorum(make_plan(cohort=8, quorum=given).config, 10) == needed


def test_who_owes_an_answer_or_is_out_of_reach_is_not_asked(drawn):
    history = History(round=1, pending={"c1": Asked("c1", 1, "v")})

    assert drawn(history, unreachable=["c2", "elsewhere"]) == TEN[:1] + TEN[3:]


@pytest.mark.parametrize(("in_a_row", "rounds"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_after_k_faults_in_a_row_a_client_sits_out_2_to_the_k_minus_1_rounds(
    make_plan, in_a_row, rounds
):
    config = make_plan().config
    history = History(faults={"a": Faults(in_a_row, round=10)})

    out = [r for r in range(1, 40) if resting(config, history, r)]

    assert out == list(range(11, 11 + rounds))


def test_a_client_that_fails_for_ever_is_quarantined_and_its_rest_is_over(make_plan):
    history = History(faults={"a": Faults(5, 10), "b": Faults(4, 10)})

    assert quarantined(make_plan().config, history) == ("a",)
    assert resting(make_plan().config, history, 11) == {"b"}
    never = make_plan().config.model_copy(update={"quarantine_after": None})
    assert quarantined(never, history) == ()
    assert quarantined(make_plan(quarantine_after=4).config, history) == ("a", "b")


def test_who_rests_is_asked_where_the_others_are_too_few(drawn):
    history = History(round=1, faults={"a": Faults(1, 1), "b": Faults(9, 1)})

    assert drawn(history, clients=("a", "b", "c"), quorum=1) == ("c",)
    assert drawn(history, clients=("a", "b", "c"), quorum=2) == ("a", "c")  # b: quarantined


def test_a_client_is_not_asked_more_often_than_its_noise_was_calibrated_for(drawn):
    privacy = {"epsilon": 1, "max_participations": 2}
    history = History(round=3, asked={"c0": Times(2, 3), "c1": Times(1, 1), "c2": Times(2, 4)})

    assert drawn(history, privacy=privacy, rounds=5) == TEN[1:]  # c2 is asked in this very round
    assert drawn(history, rounds=5) == TEN


def test_an_asynchronous_run_asks_as_many_as_are_free_and_nobody_twice_from_a_version(make_plan):
    plan = make_plan(clients=TEN, asynchronous=FEDBUFF)
    people = roster(plan.participants, plan.config.cohort)
    opened = Open(1, "v", (), goal=2, quorum=1)

    first = asked_next(plan, people, History(open=opened))
    assert len(first) == 3
    waiting = {c: Asked(c, 1, "v") for c in first[:2]}
    opened = replace(opened, assigned=frozenset(first), refused=frozenset({"c9"}))
    [second] = asked_next(plan, people, History(open=opened, pending=waiting))
    assert second not in {*first, "c9"}
    assert asked_next(plan, people, History(open=opened, pending=dict.fromkeys("abc"))) == ()


def test_an_asynchronous_run_asks_who_rests_only_where_nobody_trains(make_plan):
    plan = make_plan(clients=("a", "b"), asynchronous=FEDBUFF)
    people = roster(plan.participants, plan.config.cohort)
    opened = Open(2, "v", (), goal=2, quorum=1)
    history = History(round=1, open=opened, faults={"a": Faults(1, 1), "b": Faults(1, 1)})

    assert asked_next(plan, people, history) == ("a", "b")
    assert asked_next(plan, people, replace(history, pending={"z": Asked("z", 1, "v")})) == ()


def test_staleness_weighs_by_a_power():
    assert [Staleness().weight(s) for s in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert Staleness(power=0).weight(5) == 1.0
    assert Staleness(power=1).weight(4) == 0.2
