"""Who is there: the registered whose data are, and of the simulated those that are not away."""

from dataclasses import replace

import pytest

from clients.assignment import DataSpec
from orchestrator import service
from orchestrator.availability import absent
from orchestrator.federation import RoundFailed
from storage.ledger import ClientRecord

FOUR = ("a", "b", "c", "d")
ONLY = {"cohort": {"available_only": True}}


@pytest.fixture
def registered(workspace, make_plan, tmp_path):
    """Return a function that makes a plan of four registered clients with data."""

    def make(**changes):
        plan = make_plan(FOUR, **(ONLY | changes))
        people = []
        for one in plan.participants:
            (tmp_path / one.name).write_text("{}")
            people.append(replace(one, data=DataSpec(f"jsonl:{tmp_path / one.name}")))
        workspace.ledger.add_clients(
            [ClientRecord(p.name, p.data.uri, p.population) for p in people]
        )
        return replace(plan, participants=tuple(people))

    return make


def test_who_is_registered_no_more_or_whose_data_are_gone_is_not_there(
    workspace, registered, tmp_path
):
    plan = registered()
    assert absent(plan, 1, workspace.ledger) == set()
    workspace.ledger.remove_client("b")
    (tmp_path / "d").unlink()
    assert absent(plan, 1, workspace.ledger) == {"b", "d"}


def test_the_data_of_a_cluster_s_workers_are_not_looked_for_here(workspace, registered, tmp_path):
    plan = registered(backend={"name": "ray", "address": "10.0.0.1:6379"})
    workspace.ledger.remove_client("b")
    (tmp_path / "d").unlink()
    assert absent(plan, 1, workspace.ledger) == {"b"}


def test_nobody_is_looked_for_unless_it_matters(workspace, registered, tmp_path):
    plan = registered(cohort={})
    (tmp_path / "d").unlink()
    assert absent(plan, 1, workspace.ledger) == set()


@pytest.fixture
def simulated(tiny, notes):
    """Return a function that makes the config of four simulated clients in three rounds."""
    simulate = {"data": notes(size=16), "by": "iid", "parts": 4, "public": True}
    away = [{"kind": "away", "client": "part-1", "round": r} for r in (1, 3)]

    def make(**changes):
        base = {"clients": {"simulate": simulate}, "rounds": 3, "faults": away, "retries": 0}
        return tiny(**(base | changes))

    return make


def rounds(workspace, kind, key):
    [run] = workspace.ledger.runs()
    return [e.data[key] for e in workspace.ledger.events(run.id) if e.kind == kind]


def test_a_simulated_client_that_is_away_is_not_asked(workspace, simulated):
    service.launch(workspace, simulated(**ONLY))

    asked = rounds(workspace, "round", "cohort")
    assert ["part-1" in cohort for cohort in asked] == [False, True, False]
    assert rounds(workspace, "refused", "client") == []


def test_one_that_is_away_and_asked_all_the_same_fails_at_once(workspace, simulated):
    service.launch(workspace, simulated())

    assert rounds(workspace, "refused", "reason") == [
        "part-1 is not there in round 1",
        "part-1 is not there in round 3",
    ]


def test_a_round_of_which_nobody_is_there_fails_with_a_sentence(workspace, simulated):
    everybody = {"kinds": ["away"], "clients": 1.0}
    with pytest.raises(RoundFailed, match="no client was left to ask"):
        service.launch(workspace, simulated(faults=everybody, **ONLY))
