"""Phases follow from the order of events."""

import pytest

from orchestrator.observers.phases import Phases


@pytest.fixture
def after(clock):
    """Return a function that says what ended with an event, a second after the one before."""
    phases = Phases(clock)

    def tell(kind, seconds=1.0, **data):
        clock.now += seconds
        return [(p.name, p.round, p.seconds) for p in phases.after(kind, data)]

    return tell


def test_a_round_is_cut_into_its_phases(after):
    assert after("run") == []
    assert after("started", 5) == []
    assert after("round", 1, round=3) == [("plan", 3, 1)]
    assert after("assigned", 2, round=3) == [("reserve", 3, 2)]
    assert after("training", 1, client="a") == []
    assert after("accepted", 10, client="a") == []
    assert after("refused", 4, client="b") == []
    # from the assignments to the last result; the rest belongs to the aggregation
    assert after("aggregated", 3, round=3) == [("train", 3, 15), ("aggregate", 3, 3)]
    assert after("committed", 7, round=3) == [("commit", 3, 7)]
    assert after("evaluated", 8, round=3) == [("evaluate", 3, 8)]
    assert after("round", 1, round=4) == [("plan", 4, 1)]


def test_the_event_closed_ends_the_training(after):
    for kind in ("run", "assigned"):
        after(kind, round=1)
    after("accepted", 2)

    assert after("closed", 3, round=1) == [("train", 1, 5)]
    after("late", 1, client="b")
    assert after("aggregated", 1, round=1) == [("aggregate", 1, 2)]


def test_a_refusal_before_anything_is_sent_is_not_training(after):
    after("run")
    after("round", 1, round=1)
    after("refused", 1, client="b")
    assert after("assigned", 1, round=1) == [("reserve", 1, 2)]
    after("accepted", 4)
    assert after("aggregated", 1)[0] == ("train", 1, 4)


def test_a_run_that_goes_on_inside_a_round_is_followed(after):
    after("run")
    after("accepted", 2, client="a")
    assert after("aggregated", 1, round=7) == [("train", 7, 2), ("aggregate", 7, 1)]


def test_unknown_events_and_data_are_passed_over(after):
    assert after("claimed", owner="me") == []
    assert after("committed", 1) == [("commit", 0, 0)]
