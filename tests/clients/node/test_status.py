"""What a site's owner sees of what ran, was sent and was spent."""

import json

import pytest

from clients.accounting import epsilon
from clients.assignment import NoiseShare
from clients.charges import spend_of
from clients.node.resident import Resident
from clients.node.status import status
from strategies.spends import ClientLevel

CENTRAL = ClientLevel(clip=1.0, noise_multiplier=4.0, cohort=2)


@pytest.fixture
def worked(node, order):
    """Return settings of a node that answered two rounds, and refused a third."""
    settings = node({"max_steps": 2})
    resident = Resident(settings)
    for change in ({}, {"round": 2}, {"round": 3, "steps": 3}):
        resident.answer(order(**change))
    return settings


def test_before_a_node_ran_nothing_was_spent(node):
    settings = node()

    found = status(settings)

    assert [(d["client"], d["epsilon"]) for d in found["data"]] == [("clinic-7", 0.0)]
    assert (found["runs"], found["answers"]) == ([], [])
    assert not settings.state.exists()


def test_what_ran_and_what_was_sent_is_listed(worked):
    found = status(worked)

    [run] = found["runs"]
    assert (run["run"], run["name"], run["strategy"]) == ("run-1", "notes-1", "fedavg")
    assert (run["protection"], run["updates"]) == ("examples", 2)
    refused, second, first = found["answers"]
    assert (first["round"], first["outcome"]) == (1, "update")
    assert (second["round"], second["outcome"]) == (2, "update")
    assert "max_steps is 2" in refused["reason"]
    assert run["bytes"] == first["bytes"] + second["bytes"] > 0
    assert len(first["sha256"]) == 64


def test_what_was_spent_is_a_bound_and_tight_where_it_is_asked_for(worked, asked):
    exact = epsilon([spend_of(asked()), spend_of(asked())], 1e-5)

    [data] = status(worked)["data"]
    [tight] = status(worked, exact=True)["data"]

    assert tight["epsilon"] == pytest.approx(exact)
    assert exact <= data["epsilon"] < 3 * exact
    assert (data["budget"], data["unprotected_runs"]) == (100.0, 0)


def test_runs_without_privacy_are_counted(node, order):
    settings = node({"without_privacy": True})
    Resident(settings).answer(order(privacy=None))

    [data] = status(settings)["data"]

    assert data["unprotected_runs"] == 1


def test_of_a_shared_noise_it_says_what_holds_against_the_coordinator(node, order):
    settings = node(epsilon=1000.0)
    shared = {"privacy": None, "central": CENTRAL, "noise_share": NoiseShare(2)}
    Resident(settings).answer(order(**shared))

    [data] = status(settings, exact=True)["data"]

    assert data["epsilon_against_coordinator"] > data["epsilon"] > 0


def test_it_is_json(worked):
    assert json.loads(json.dumps(status(worked), allow_nan=False))["name"] == "clinic-7"
