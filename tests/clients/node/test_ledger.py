"""A site's ledger: durable before release, and the last word on budgets."""

import json
import sqlite3
import stat
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from clients.accounting import BudgetSpent, epsilon
from clients.charges import Charge
from clients.node.ledger import Budget, Entry, Ledger, LedgerUnavailable, MixedProtection

DELTA = 1e-5
OPEN = Budget(DELTA)


def charge(round_=1, run="run-1", population="north", **changes):
    facts = {
        "event": f"{run}/{round_}",
        "population": population,
        "client": "clinic-7",
        "run": run,
        "round": round_,
        "assignment": "ab" * 32,
        "mechanism": "gaussian",
        "unit": "example",
        "adjacency": "add-remove",
        "parameters": {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10.0},
    }
    return Charge(**(facts | changes))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def ledger(folder):
    return Ledger(folder)


def total(*charges):
    return epsilon([one.spend for one in charges], DELTA)


def test_what_was_charged_is_there_after_the_process_is_gone(folder):
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "from clients.charges import Charge; from clients.node.ledger import Budget, Ledger\n"
        "import clients.node.ledger as own; own.epsilon = lambda *_: 0.0  # seconds of imports\n"
        "one = Charge(**json.loads(sys.argv[2]))\n"
        "Ledger(Path(sys.argv[1])).charge(one, Budget(1e-5))\n"
        "os._exit(9)"
    )
    argv = [sys.executable, "-c", code, str(folder), json.dumps(asdict(charge()))]
    done = subprocess.run(argv, check=False, timeout=120)

    assert done.returncode == 9
    assert Ledger(folder).charges("north") == [charge()]


def test_the_same_event_costs_once(ledger):
    ledger.charge(charge(), OPEN)
    ledger.charge(charge(), Budget(DELTA, epsilon=1e-3))  # also where the budget is spent since

    assert ledger.charges("north") == [charge()]


def test_a_budget_holds_to_the_last_round_that_fits(ledger):
    budget = Budget(DELTA, epsilon=total(charge(1), charge(2)) + 1e-6)
    ledger.charge(charge(1), budget)
    ledger.charge(charge(2), budget)

    with pytest.raises(BudgetSpent, match="the site lets all runs together spend ε = "):
        ledger.charge(charge(3), budget)

    assert ledger.charges("north") == [charge(1), charge(2)]


def test_the_budget_of_a_run_is_that_of_this_run_alone(ledger):
    budget = Budget(DELTA, per_run=total(charge()) + 1e-6)
    ledger.charge(charge(run="run-1"), budget)
    ledger.charge(charge(run="run-2"), budget)

    with pytest.raises(BudgetSpent, match="the site lets this run spend"):
        ledger.charge(charge(2, run="run-2"), budget)


def test_populations_have_budgets_of_their_own(ledger):
    budget = Budget(DELTA, epsilon=total(charge()) + 1e-6)
    ledger.charge(charge(event="a"), budget)
    ledger.charge(charge(event="b", population="south"), budget)

    assert ledger.spent("south") == [charge().spend]


def test_spends_that_cannot_be_added_are_over_any_budget(ledger):
    ledger.charge(charge(), OPEN)
    other = charge(2, unit="patient_id")

    with pytest.raises(BudgetSpent, match="cannot be added"):
        ledger.charge(other, Budget(DELTA, epsilon=100))
    ledger.charge(other, OPEN)  # without a bound nothing has to be added


def test_of_noise_made_in_shares_its_own_counts(ledger):
    noise = {"noise_multiplier": 1000.0, "sample_rate": 1.0, "steps": 1.0}
    summed = {"unit": "client", "adjacency": "zero-out", "parameters": noise}
    first, later = charge(**summed), charge(2, **summed)
    budget = Budget(DELTA, epsilon=8.0)

    with pytest.raises(BudgetSpent, match="this one's alone hides its update"):
        ledger.charge(first, budget, shares=10**12)  # a share of it is no noise at all
    ledger.charge(first, replace(budget, sums=True), shares=10**12)
    ledger.charge(later, replace(budget, sums=True), shares=10**12)
    assert ledger.charges("north") == [first, later]  # as the coordinator's ledger has them

    with pytest.raises(BudgetSpent):
        ledger.charge(charge(3, **summed), budget, shares=1)  # nor are earlier ones forgotten


@pytest.mark.parametrize("later", ["examples", "none", "public"])
def test_a_run_stays_under_one_kind_of_privacy(ledger, later):
    ledger.enter(Entry("run-1", "clinic-7", "north", "notes", "fedavg", "client"))
    ledger.enter(Entry("run-1", "clinic-7", "north", "notes", "fedavg", "client"))
    ledger.enter(Entry("run-2", "clinic-7", "north", "notes", "fedavg", later))

    with pytest.raises(MixedProtection, match="must be another run"):
        ledger.enter(Entry("run-1", "clinic-7", "north", "notes", "fedavg", later))


def test_a_coordinator_is_told_what_other_runs_spent_until_it_goes_on(ledger):
    for one in (charge(run="old"), charge(2, run="old"), charge(run="new")):
        ledger.charge(one, OPEN)

    def told(round_):
        return [row["event"] for row in ledger.unknown_to("new", "north", round_)]

    assert told(1) == ["old/1", "old/2"]
    assert told(1) == ["old/1", "old/2"]  # asked again: the reply may have been lost
    ledger.charge(charge(3, run="old"), OPEN)
    assert told(2) == ["old/3"]
    assert told(3) == []


def test_what_is_told_is_the_whole_row(ledger):
    ledger.charge(charge(run="old"), OPEN)

    [row] = ledger.unknown_to("new", "north", 1)

    assert Charge(**row) == charge(run="old")


@pytest.mark.parametrize("kept", ["key", "sums-1234"])
def test_a_ledger_that_is_gone_is_not_begun_anew(folder, kept):
    Ledger(folder)
    (folder / "site" / "ab").mkdir(parents=True)
    (folder / "site" / "ab" / kept).touch()
    (folder / "ledger.db").unlink()

    with pytest.raises(LedgerUnavailable, match="Restore it from a backup"):
        Ledger(folder)


def test_nobody_else_may_read_it(ledger, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "ledger.db").stat().st_mode) == 0o600


def test_a_ledger_that_cannot_be_written_is_an_error_of_its_own(ledger, folder):
    (folder / "ledger.db").write_bytes(b"no database at all" * 100)

    with pytest.raises(LedgerUnavailable, match="nothing is released without it"):
        ledger.charge(charge(), OPEN)


def test_a_charge_that_fails_on_its_way_leaves_nothing(ledger, folder):
    with sqlite3.connect(folder / "ledger.db") as other:
        other.execute("DROP TABLE bounds")

    with pytest.raises(LedgerUnavailable):
        ledger.charge(charge(), OPEN)

    assert ledger.charges("north") == []
