"""Who is there: the registered whose data are, and of the simulated those that are not away."""

from dataclasses import replace

import pytest

from clients.assignment import DataSpec
from orchestrator import nodes, service
from orchestrator.availability import absent
from orchestrator.federation import RoundFailed
from orchestrator.node_keys import ONLINE_FOR
from storage.ledger import ClientRecord
from storage.nodes import Sighting
from storage.records import now

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


def test_the_data_of_a_site_are_not_looked_for_here(workspace, registered):
    plan = registered()
    away = [replace(p, data=DataSpec("site:notes")) for p in plan.participants]

    assert absent(replace(plan, participants=tuple(away)), 1, workspace.ledger) == set()


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


# ---- at sites


@pytest.fixture
def sites(workspace, site, make_plan):
    """Return a function that makes a plan of four clients at sites of their own."""
    made = {name: site(name) for name in FOUR}
    for one in made.values():
        nodes.admit(workspace.ledger, one.join(), nodes.Terms())

    def make(**changes):
        plan = make_plan(FOUR, **changes)
        people = [replace(p, data=DataSpec("site:notes")) for p in plan.participants]
        return replace(plan, participants=tuple(people))

    return make


@pytest.mark.parametrize("cohort", [{}, {"available_only": True}])
def test_whose_node_is_shut_out_is_never_asked_and_the_log_says_why(workspace, sites, cohort):
    nodes.disable(workspace.ledger, "b", "its disk is full")
    nodes.remove(workspace.ledger, "c")
    log = []

    found = absent(
        sites(cohort=cohort), 3, workspace.ledger, lambda kind, data: log.append((kind, data))
    )

    assert found == {"b", "c"}
    [(kind, data)] = log
    assert (kind, data["round"], set(data["clients"])) == ("barred", 3, {"b", "c"})
    assert data["clients"]["b"].endswith("its disk is full")


def test_who_is_let_in_costs_the_log_no_line(workspace, sites):
    log = []
    found = absent(sites(), 1, workspace.ledger, lambda kind, data: log.append(kind))
    assert (found, log) == (set(), [])


def test_a_node_that_was_seen_and_fell_silent_is_not_there(workspace, sites):
    moment = now()
    seen = {"a": moment, "b": moment - 2 * ONLINE_FOR, "c": None}  # d is known to no SuperLink
    workspace.ledger.nodes.see([Sighting(n, "SHA256:x", "1", at) for n, at in seen.items()])
    assert absent(sites(**ONLY), 1, workspace.ledger) == {"b", "c"}
    assert absent(sites(), 1, workspace.ledger) == set()


def test_a_run_goes_on_without_a_node_that_is_shut_out(workspace, sites, run_in, imagined):
    planned = sites(rounds=2)
    nodes.disable(workspace.ledger, "b")
    run_in(workspace, lambda _: planned, imagined(), lambda kind, data: None).run()

    [run] = workspace.ledger.runs()
    events = workspace.ledger.events(run.id)
    assert [e.data["cohort"] for e in events if e.kind == "round"] == [["a", "c", "d"]] * 2
    assert [e.data["round"] for e in events if e.kind == "barred"] == [1, 2]
