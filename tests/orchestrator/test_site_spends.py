"""A site's ledger adds to this one what it lacks, of its own data alone, and nothing breaks."""

import pytest

from orchestrator.budgets import Budgets
from orchestrator.nodes import Terms, admit
from orchestrator.site_spends import MOST_ROWS, learn
from storage.nodes import Sighting


def row(number=1, **changes):
    """Return a spend as a site tells it."""
    given = {
        "event": f"{number:064x}",
        "population": "north",
        "client": "clinic",
        "run": "of another coordinator",
        "round": 1,
        "assignment": "ab" * 32,
        "mechanism": "gaussian",
        "unit": "example",
        "adjacency": "add-remove",
        "parameters": {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10.0},
    }
    return given | changes


@pytest.fixture
def ledger(workspace, site):
    admit(workspace.ledger, site("north").join(), Terms())
    admit(workspace.ledger, site("south").join(), Terms())
    return workspace.ledger


def test_what_a_site_spent_elsewhere_counts_here(ledger):
    new = learn(ledger, "north", {"spends": [row(1), row(2, round=2)]})

    assert [one.event for one in new] == [f"{1:064x}", f"{2:064x}"]
    [limit] = Budgets(ledger).on("north")
    assert [spend.parameters["steps"] for spend in limit.history] == [10.0, 10.0]
    assert Budgets(ledger).on("south")[0].history == ()


def test_what_is_known_counts_once(ledger):
    learn(ledger, "north", {"spends": [row(1)]})
    assert learn(ledger, "north", {"spends": [row(1), row(1)]}) == []
    assert len(ledger.spends("north")) == 1


def test_more_than_the_budget_is_recorded_all_the_same(ledger):
    loud = {"noise_multiplier": 0.1, "sample_rate": 1.0, "steps": 1000.0}
    learn(ledger, "north", {"spends": [row(1, parameters=loud)]})
    assert len(ledger.spends("north")) == 1


def test_a_spend_that_was_taken_back_here_counts_again_when_its_site_says_so(ledger):
    learn(ledger, "north", {"spends": [row(1)]})
    ledger.void_spend(f"{1:064x}", "never sent")
    learn(ledger, "north", {"spends": [row(1)]})
    assert len(ledger.spends("north")) == 1


HOSTILE = [
    row(population="south"),
    row(population="nobody"),
    row(event="short"),
    row(event="G" * 64),
    row(round=0),
    row(round=True),
    row(round=2**40),
    row(round="1"),
    row(mechanism="laplace"),
    row(adjacency="replace"),
    row(adjacency="zero-out"),
    row(unit=""),
    row(unit=7),
    row(run="a\nb"),
    row(run="x" * 500),
    row(client=None),
    row(more=1),
    {k: v for k, v in row().items() if k != "run"},
    *(
        row(parameters={"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10.0} | bad)
        for bad in (
            {"noise_multiplier": 0.0},
            {"noise_multiplier": -1.0},
            {"noise_multiplier": float("nan")},
            {"noise_multiplier": float("inf")},
            {"noise_multiplier": "1"},
            {"sample_rate": 1.5},
            {"steps": 0.5},
            {"steps": 1e300},
            {"extra": 1.0},
        )
    ),
    row(parameters={}),
    row(parameters=[]),
    "spend",
    None,
    [],
]


@pytest.mark.parametrize("bad", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_row_is_left_out_and_the_others_are_not(ledger, caplog, bad):
    new = learn(ledger, "north", {"spends": [row(7), bad, row(8)]})

    assert [int(one.event, 16) for one in new] == [7, 8]
    assert ledger.spends("south") == []
    assert ledger.spent_populations() == {"north"}
    [line] = [r.getMessage() for r in caplog.records if "is refused" in r.getMessage()]
    assert line.isprintable()
    assert len(line) < 300


def test_another_spend_under_a_known_event_is_refused(ledger, caplog):
    learn(ledger, "north", {"spends": [row(1)]})
    quiet = {"noise_multiplier": 9.0, "sample_rate": 0.1, "steps": 1.0}
    new = learn(ledger, "north", {"spends": [row(1, parameters=quiet), row(2)]})
    assert [int(one.event, 16) for one in new] == [2]
    assert ledger.spends("north")[0].parameters["noise_multiplier"] == 1.0
    assert any("is recorded as another spend" in r.getMessage() for r in caplog.records)


def test_a_site_cannot_take_a_spend_of_somebody_else_s_data_back(ledger):
    learn(ledger, "south", {"spends": [row(1, population="south")]})
    learn(ledger, "north", {"spends": [row(1)]})
    assert len(ledger.spends("south")) == 1
    assert ledger.spends("north") == []


@pytest.mark.parametrize("spends", [None, "x", {}, [row(n) for n in range(MOST_ROWS + 1)]])
def test_what_is_no_list_of_spends_is_passed_over(ledger, spends):
    assert learn(ledger, "north", {"spends": spends}) == []
    assert ledger.spends("north") == []


def test_the_versions_that_a_site_says_it_has_are_known(ledger):
    ledger.nodes.see([Sighting("north", "SHA256:x")])
    learn(ledger, "north", {"weft": "0.2.0", "flwr": "1.41.1"})
    learn(ledger, "north", {"weft": "\x1b[31m", "flwr": 7})
    learn(ledger, "north", {})
    seen = ledger.nodes.sightings()["north"]
    assert (seen.weft, seen.flwr) == ("0.2.0", "1.41.1")
