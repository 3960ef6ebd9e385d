"""What each check of a gate says, and by how much it fails."""

import pytest

from orchestrator import gate_checks
from orchestrator.gate_checks import Cost, Size
from orchestrator.gate_file import (
    BaseCheck,
    Bounds,
    Ceiling,
    LicenceCheck,
    SizeCheck,
    TasksCheck,
)
from orchestrator.gate_suite import Scored

BASE = "ab" * 32


def scored(accuracy=0.8, loss=1.0, size=1000, **problems):
    scores = {"mail": {"accuracy": accuracy, "loss": loss, "num_examples": float(size)}}
    return Scored("v", {k: v for k, v in scores.items() if k not in problems}, problems)


def of_metric(metric, there=None, version=None, **bounds):
    asked = {"mail": {metric: Bounds(**bounds)}}
    return list(gate_checks.metrics(asked, version or scored(), there))


@pytest.mark.parametrize(
    ("metric", "bounds", "passed", "short"),
    [
        ("accuracy", {"at_least": 0.8}, True, 0),
        ("accuracy", {"at_least": 0.85}, False, 0.05),
        ("loss", {"at_most": 1.0}, True, 0),
        ("loss", {"at_most": 0.75}, False, 0.25),
    ],
)
def test_a_score_is_held_against_a_bound(metric, bounds, passed, short):
    (found,) = of_metric(metric, **bounds)
    assert (found.passed, found.short) == (passed, pytest.approx(short))


@pytest.mark.parametrize(
    ("metric", "before", "worse_by", "passed", "short"),
    [
        ("accuracy", {"accuracy": 0.83}, 0.05, True, 0),
        ("accuracy", {"accuracy": 0.9}, 0.05, False, 0.05),
        ("accuracy", {"accuracy": 0.5}, 0, True, 0),
        ("loss", {"loss": 0.7}, 0.1, False, 0.2),
        ("loss", {"loss": 1.5}, 0, True, 0),
    ],
)
def test_a_score_is_held_against_that_of_the_version_there_is(
    metric, before, worse_by, passed, short
):
    (found,) = of_metric(metric, scored(**before), worse_by=worse_by)
    assert (found.passed, found.short) == (passed, pytest.approx(short))


def test_the_first_version_can_be_worse_than_none():
    assert of_metric("accuracy", None, worse_by=0) == []


def test_each_bound_is_a_check():
    found = of_metric("accuracy", scored(), at_least=0.5, at_most=0.9, worse_by=0.1)
    assert [one.passed for one in found] == [True] * 3


def test_what_was_not_measured_fails():
    (found,) = of_metric("rouge_l", at_least=0.1)
    assert not found.passed
    assert "rouge_l was not measured on mail (accuracy, loss)" in found.said
    (found,) = of_metric("accuracy", version=scored(mail="record 3 has no label"), at_least=0.1)
    assert (found.passed, found.said) == (False, "cannot be checked: record 3 has no label")
    (found,) = of_metric("accuracy", scored(mail="it is gone"), worse_by=0.1)
    assert "of the version there is now, it is gone" in found.said


@pytest.mark.parametrize(
    ("after", "size", "unclear", "passed"),
    [
        (0.8, 10_000, "fail", True),
        (0.7, 10_000, "fail", False),
        (0.8, 50, "fail", False),
        (0.8, 50, "pass", True),
        (0.2, 50, "pass", False),
    ],
)
def test_a_past_task_may_fall_by_so_much(after, size, unclear, passed):
    asked = TasksCheck(tau=0.02, unclear=unclear)
    (found,) = gate_checks.tasks(asked, scored(after, size=size), scored(0.8, size=size))
    assert found.passed == passed
    assert (found.short > 0) != passed
    assert ("too few to tell" in found.said) == (after == 0.8 and size == 50)


def test_a_past_task_that_cannot_be_scored_any_more_fails():
    asked = TasksCheck(tau=0.02)
    (found,) = gate_checks.tasks(asked, scored(mail="no such label"), scored())
    assert (found.passed, found.said) == (False, "cannot be checked: no such label")
    assert list(gate_checks.tasks(asked, scored(), None)) == []


def test_a_size_has_bounds():
    asked = SizeCheck(max_bytes=100, max_rank=8)
    found = list(gate_checks.size(asked, Size(num_bytes=120, num_parameters=30, rank=8)))
    assert [(one.subject, one.passed, one.short) for one in found] == [
        ("bytes", False, 20),
        ("rank", True, 0),
    ]


def test_a_base_model_is_the_one_allowed_and_the_one_there_is():
    def passed(found, there, **asked):
        return [one.passed for one in gate_checks.base(BaseCheck(**asked), found, there)]

    assert passed(BASE, BASE, hashes=("ab" * 4,)) == [True, True]
    assert passed(BASE, "cd" * 32, hashes=("ef" * 4, "ab" * 4)) == [True, False]
    assert passed(BASE, None, hashes=("ef" * 4,)) == [False]
    assert passed(BASE, "cd" * 32, same=False) == []


@pytest.mark.parametrize(
    ("known", "card", "passed"),
    [
        ({}, "Apache-2.0", True),
        ({}, "llama3", False),
        ({"ab" * 4: "llama3"}, "apache-2.0", False),
        ({}, None, False),
    ],
)
def test_a_licence_is_stated_or_on_the_card_or_unknown(known, card, passed):
    asked = LicenceCheck(allowed=("apache-2.0", "mit"), known=known)
    found = gate_checks.licences(asked, BASE, card)
    assert found.passed == passed
    assert ("state it under licences.known" in found.said) == (card is None)


def ceilings(*asked):
    return [Ceiling(population=p, unit=u, delta=1e-5, at_most=m) for p, u, m in asked]


def test_an_epsilon_is_held_against_its_own_population_s_ceiling_first():
    asked = ceilings(("*", "example", 8), ("ward", "example", 2))
    costs = [Cost("ward", "example", 3.0), Cost("study", "example", 3.0)]
    found = list(gate_checks.epsilon(asked, costs))
    assert [(one.subject, one.passed, one.short) for one in found] == [
        ("ward by example", False, 1.0),
        ("study by example", True, 0.0),
    ]
    assert found[0].said == "ε = 3 (δ = 1e-05, unit example), and may be at most 2"


def test_what_no_ceiling_is_for_or_nothing_bounds_fails():
    asked = ceilings(("*", "example", 8))
    found = list(
        gate_checks.epsilon(asked, [Cost("a", "client", 0.0), Cost("b", "any unit", None)])
    )
    assert [one.passed for one in found] == [False, False]
    assert "no ceiling names this unit" in found[0].said
    assert "without differential privacy" in found[1].said
