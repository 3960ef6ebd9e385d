"""One stream of assignments and results, over many rounds."""

from dataclasses import replace

import pytest

from clients.evaluate import Evaluation
from orchestrator.backends.base import Failure
from orchestrator.desk import Desk
from orchestrator.plan import RoundInputs, plan_evaluation, plan_round
from orchestrator.sections import EvaluateConfig
from strategies.base import Broadcast, Update


@pytest.fixture
def asked(make_plan, tensors):
    """Return assignments of clients a, b and c, and one that evaluates."""
    plan, inputs = make_plan(), RoundInputs(1, "f" * 64, {}, {}, "/site")
    sent = Broadcast(tensors())
    trained = plan_round(plan, inputs, lambda client: sent, plan.participants)
    return trained, plan_evaluation(plan, inputs, tensors(), EvaluateConfig(data="jsonl:/x"))


def results(desk, count):
    found = []
    while len(found) < count:
        result = desk.next()
        if result is not None:
            found.append(result.client)
    return found


def test_what_comes_up_later_goes_to_the_same_stream(imagined, asked):
    (a, b, c), _ = asked
    desk = Desk(imagined(), lambda assignment: None)
    desk.ask([a])
    assert results(desk, 1) == ["a"]
    desk.ask([b])
    desk.ask([c])
    assert results(desk, 2) == ["b", "c"]


def test_nothing_to_do_is_a_tick(imagined):
    assert Desk(imagined(), lambda assignment: None).next() is None


def test_one_result_is_waited_for_and_the_others_are_kept(imagined, asked):
    (a, b, _), evaluation = asked
    desk = Desk(imagined({("", 1): 3}), lambda assignment: None)
    desk.ask([a, b])

    assert isinstance(desk.one(evaluation, 60), Evaluation)
    assert [type(desk.next()) for _ in "ab"] == [Update, Update]


def test_one_result_that_does_not_come_in_time_is_a_failure(imagined, asked):
    (a, _, _), evaluation = asked
    desk = Desk(imagined(), lambda assignment: None)
    desk.ask([a])

    assert isinstance(desk.one(evaluation, -1), Failure)
    assert results(desk, 1) == ["a"]
    assert desk.next() is None  # it was not begun, and never will be


def test_the_answer_of_one_that_was_given_up_is_not_taken_for_the_next(imagined, asked):
    (a, _, _), first = asked
    backend = imagined({("", 1): 9, ("", 2): 20, ("a", 1): 15})
    desk = Desk(backend, lambda assignment: None, clock=lambda: backend.now)
    desk.ask([a])

    assert isinstance(desk.one(first, 3), Failure)
    assert desk.one(replace(first, round=2), 60).round == 2
    assert results(desk, 1) == ["a"]


def test_the_answer_of_one_that_was_given_up_is_nobody_s(imagined, asked):
    (a, _, _), first = asked
    backend = imagined({("", 1): 9, ("a", 1): 15})
    desk = Desk(backend, lambda assignment: None, clock=lambda: backend.now)

    assert isinstance(desk.one(first, 3), Failure)
    desk.ask([a])
    assert results(desk, 1) == ["a"]


def test_one_result_is_tried_for_again_as_often_as_is_said(imagined, asked):
    _, evaluation = asked
    told = []
    desk = Desk(imagined(fails={"": 3}), lambda assignment: None)

    assert isinstance(desk.one(evaluation, 60, 1, told.append), Failure)
    assert isinstance(desk.one(evaluation, 60, 1, told.append), Evaluation)
    assert [failure.reason for failure in told] == ["out of memory"] * 2


def test_giving_up_ends_what_runs_and_forgets_what_waits(imagined, asked):
    (a, b, c), _ = asked
    backend = imagined({("a", 1): 99})
    desk = Desk(backend, lambda assignment: None)
    desk.ask([a])
    assert desk.next() is None
    desk.ask([b])
    desk.give_up()

    assert backend.given_up == ["a"]
    desk.ask([replace(c, round=2)])
    assert results(desk, 1) == ["c"]
    assert backend.asked == [("a", 1), ("c", 2)]
