"""The measures of a stream, on matrices small enough to compute by hand."""

import pytest

from orchestrator.continual import (
    BadMatrix,
    Matrix,
    Share,
    average,
    backward_transfer,
    fallen,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    verdict_of,
)

TASKS = ("a", "b", "c")


def matrix(*rows, after=(0, 1, 2, 3), **options):
    return Matrix(TASKS, after, rows, **options)


HAND = matrix((0.1, 0.2, 0.3), (0.8, 0.0, 0.0), (0.6, 0.9, 0.0), (0.5, 0.7, 0.95))


def test_the_measures_of_the_hand_matrix_are_what_the_papers_formulas_give():
    assert average(HAND) == pytest.approx((0.5 + 0.7 + 0.95) / 3)
    assert backward_transfer(HAND) == pytest.approx(-0.25)
    assert forgetting(HAND) == pytest.approx(0.25)
    assert forward_transfer(HAND) == pytest.approx(((0.0 - 0.2) + (0.0 - 0.3)) / 2)
    assert learning_accuracy(HAND) == pytest.approx((0.8 + 0.9 + 0.95) / 3)


def test_forgetting_is_from_the_best_past_score_and_backward_transfer_from_the_tasks_own():
    rose = matrix((0.0, 0.0, 0.0), (0.5, 0.0, 0.0), (0.9, 0.6, 0.0), (0.7, 0.8, 0.9))
    assert backward_transfer(rose) == pytest.approx(((0.7 - 0.5) + (0.8 - 0.6)) / 2)
    assert forgetting(rose) == pytest.approx(((0.9 - 0.7) + (0.6 - 0.8)) / 2)


def test_of_losses_a_rise_is_a_loss():
    def turned(row):
        return tuple(1 - score for score in row)

    losses = matrix(*(turned(row) for row in HAND.rows), lower_is_better=True)
    for measure in (backward_transfer, forgetting, forward_transfer):
        assert measure(losses) == pytest.approx(measure(HAND))
    assert average(losses) == pytest.approx(1 - average(HAND))


def test_a_stream_in_the_middle_is_measured_by_the_tasks_it_has_learned():
    begun = matrix(*HAND.rows[:3], after=(0, 1, 2))
    assert average(begun) == pytest.approx((0.6 + 0.9) / 2)
    assert backward_transfer(begun) == pytest.approx(-0.2)
    assert forward_transfer(begun) == pytest.approx(-0.2)


def test_one_task_has_nothing_to_forget_or_to_transfer():
    first = matrix(*HAND.rows[:2], after=(0, 1))
    assert average(first) == pytest.approx(0.8)
    assert [f(first) for f in (backward_transfer, forward_transfer, forgetting)] == [None] * 3


def test_a_missing_score_leaves_out_what_needs_it_and_nothing_else():
    holed = matrix((None, None, None), *HAND.rows[1:])
    assert forward_transfer(holed) is None
    assert backward_transfer(holed) == backward_transfer(HAND)


def test_joint_training_has_an_average_and_is_a_ceiling():
    joint = Matrix(("c", "b", "a"), (0, 3), ((0.1, 0.1, 0.1), (0.98, 0.92, 0.86)))
    assert average(joint) == pytest.approx((0.98 + 0.92 + 0.86) / 3)
    assert backward_transfer(joint) is None
    gaps = (0.86 - 0.8, 0.92 - 0.9, 0.98 - 0.95)
    assert intransigence(HAND, joint) == pytest.approx(sum(gaps) / 3)
    assert intransigence(HAND, Matrix(("a",), (0, 1), ((0.1,), (0.9,)))) is None


@pytest.mark.parametrize(
    ("after", "rows"), [((0, 1), ((1.0,),)), ((1, 0), ((1.0,), (1.0,))), ((0,), ((1.0, 1.0),))]
)
def test_what_is_no_matrix_is_refused(after, rows):
    with pytest.raises(BadMatrix):
        Matrix(("a",), after, rows)


def test_the_interval_of_a_fall_is_newcombes():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 = 0.2 (0.0524, 0.3339)
    found = fallen("a", Share(56 / 70, 70), Share(48 / 80, 80), tolerance=0.0)
    assert (found.fall, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("after", "size", "verdict"),
    [(0.9, 10_000, "holds"), (0.8, 10_000, "falls"), (0.88, 50, "unclear"), (0.95, 2000, "holds")],
)
def test_a_fall_is_judged_by_its_whole_interval(after, size, verdict):
    assert fallen("a", Share(0.9, size), Share(after, size), 0.02).verdict == verdict


def test_the_verdict_is_that_of_the_worst_task():
    holds, unclear, falls = (
        fallen("a", Share(0.9, n), Share(p, n), 0.02)
        for p, n in ((0.9, 10_000), (0.88, 50), (0.5, 100))
    )
    assert verdict_of([holds, unclear, falls]) == "falls"
    assert verdict_of([unclear, holds]) == "unclear"
    assert verdict_of([holds]) == verdict_of([]) == "holds"


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(BadMatrix, match="between 0 and 1"):
        Share(1.2, 10)
    with pytest.raises(BadMatrix, match="tolerance"):
        fallen("a", Share(0.5, 10), Share(0.5, 10), tolerance=2)
