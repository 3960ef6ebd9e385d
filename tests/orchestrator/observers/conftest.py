"""Fixtures of the observers' tests: a run's events, and a clock that is turned by hand."""

import pytest

from orchestrator.epsilons import Epsilon


class Clock:
    """Returns the seconds it was set to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def spent():
    """Return a function that makes what a run has spent, by population, as a run's events do."""

    def make(**epsilons):
        made = {
            name: Epsilon(name, value, 1e-5, "example", "add-remove")
            for name, value in epsilons.items()
        }
        return lambda: made

    return make


@pytest.fixture
def events(make_plan, spent):
    """Return the events of a run of two rounds, in which client ``b`` once fails."""
    plan = make_plan()

    def a_round(number, **epsilons):
        return [
            ("round", {"round": number, "cohort": ["a", "b"]}),
            ("assigned", {"round": number, "assigned": ["a", "b"], "bytes": 2000}),
            ("training", {"client": "a"}),
            ("training", {"client": "b"}),
            ("accepted", {"client": "a", "bytes": 300, "loss": 0.5}),
            ("refused", {"client": "b", "reason": "out of memory"})
            if number == 1
            else ("accepted", {"client": "b", "bytes": 300, "loss": 1.5}),
            ("aggregated", {"round": number}),
            (
                "committed",
                {
                    "round": number,
                    "version": "ab" * 32,
                    "updates": number,
                    "spent": spent(**epsilons),
                },
            ),
            ("evaluated", {"round": number, "accuracy": 0.25 * number, "loss": 1.0}),
        ]

    return [
        ("run", {"run": "run-1", "name": "task-1", "plan": plan, "done": 0, "spent": spent()}),
        ("initialising", {"adapter": "lora"}),
        ("started", {"version": "cd" * 32}),
        *a_round(1, north=1.0, south=2.0),
        *a_round(2, north=1.5, south=3.0),
        ("completed", {"version": "ab" * 32, "name": "task-1:v1"}),
    ]
