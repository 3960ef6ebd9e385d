import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.canonical import NotJson
from storage.database import open_database
from storage.ledger import (
    Ledger,
    SpendConflict,
    UnknownSpend,
)


def allow(population, existing, new):
    pass


# ---- spends


def test_a_removed_client_is_gone_and_its_spends_stay(ledger, clinic, spend):
    ledger.add_client(clinic())
    ledger.record_spend(spend())
    ledger.remove_client("clinic-7")
    assert ledger.clients() == []
    assert ledger.spends("patients") == [spend()]


def test_a_spend_is_recorded_once(ledger, spend):
    assert ledger.record_spend(spend()) is True
    assert ledger.record_spend(spend()) is False
    assert ledger.spends("patients") == [spend()]


def test_a_spend_is_there_after_the_database_is_opened_again(ledger, url, spend):
    ledger.record_spend(spend())
    engine = open_database(url)
    assert Ledger(engine).spends("patients") == [spend()]
    engine.dispose()


def test_spends_are_listed_in_order_by_population_and_by_run(ledger, spend):
    rows = [
        spend("z", run="r1"),
        spend("a", run="r2"),
        spend("m", run="r1", population="others"),
    ]
    for row in rows:
        ledger.record_spend(row)
    assert ledger.spends("patients") == rows[:2]
    assert ledger.spends("others") == rows[2:]
    assert ledger.spends_of_run("r1") == [rows[0], rows[2]]
    assert ledger.spends("nobody") == []


@pytest.mark.parametrize(
    "change", [{"parameters": {"noise_multiplier": 9.0}}, {"population": "x"}, {"round": 4}]
)
def test_another_spend_with_the_same_event_is_refused(ledger, change, spend):
    ledger.record_spend(spend())
    with pytest.raises(SpendConflict, match="'run-1/clinic-7/3' is recorded as another spend"):
        ledger.record_spend(spend(**change))
    assert ledger.spends("patients") == [spend()]


def test_a_void_spend_does_not_count(ledger, spend):
    ledger.record_spend(spend("a"))
    ledger.record_spend(spend("b"))
    ledger.void_spend("a", "the worker never started")
    assert ledger.spends("patients") == [spend("b")]
    assert ledger.spends_of_run("run-1") == [spend("b")]


def test_a_void_spend_that_comes_again_counts_again(ledger, spend):
    ledger.record_spend(spend())
    ledger.void_spend(spend().event, "the worker never started")
    checked = []
    new = ledger.record_spends_within([spend()], lambda *given: checked.append(given))
    assert new == [spend()]
    assert checked == [("patients", [], [spend()])]
    assert ledger.spends("patients") == [spend()]


def test_voiding_needs_a_spend_and_a_reason(ledger, spend):
    with pytest.raises(UnknownSpend, match="no spend has the event 'x'"):
        ledger.void_spend("x", "because")
    ledger.record_spend(spend("x"))
    with pytest.raises(ValueError, match="for a reason, got none"):
        ledger.void_spend("x", "")


def test_a_check_sees_what_was_spent_and_what_would_be(ledger, spend):
    old = spend("old")
    ledger.record_spend(old)
    new = [spend("p1"), spend("o1", population="others"), spend("p2")]
    seen = []
    recorded = ledger.record_spends_within([old, *new], lambda *given: seen.append(given))
    assert seen == [("others", [], [new[1]]), ("patients", [old], [new[0], new[2]])]
    assert recorded == new
    assert ledger.spends("patients") == [old, new[0], new[2]]


def test_a_check_that_refuses_one_population_records_none(ledger, spend):
    def refuse(population, existing, new):
        if population == "patients":
            raise PermissionError("budget spent")

    with pytest.raises(PermissionError, match="budget spent"):
        ledger.record_spends_within([spend("a", population="others"), spend("b")], refuse)
    assert ledger.spends("others") == ledger.spends("patients") == []


def test_a_retry_is_not_checked_and_spends_nothing(ledger, spend):
    ledger.record_spends_within([spend()], allow)

    def refuse(population, existing, new):
        raise AssertionError("nothing new is spent")

    assert ledger.record_spends_within([spend(), spend()], refuse) == []


def test_one_event_given_twice_is_one_spend(ledger, spend):
    assert ledger.record_spends_within([spend(), spend()], allow) == [spend()]
    with pytest.raises(SpendConflict):
        ledger.record_spends_within([spend("x"), spend("x", round=9)], allow)


def test_parameters_are_compared_as_they_are_stored(ledger, spend):
    row = spend(parameters={"orders": (2, 3)})
    assert ledger.record_spend(row) is True
    assert ledger.record_spend(row) is False
    with pytest.raises(NotJson, match=r"parameters\.q must be a finite number"):
        ledger.record_spend(spend("y", parameters={"q": float("nan")}))


def test_threads_that_race_cannot_spend_more_than_the_budget(ledger, spend):
    def at_most_ten(population, existing, new):
        if len(existing) + len(new) > 10:
            raise PermissionError

    def try_to_spend(number: int) -> bool:
        rows = [spend(f"{number}/{part}") for part in range(3)]
        try:
            ledger.record_spends_within(rows, at_most_ten)
        except PermissionError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        granted = sum(pool.map(try_to_spend, range(16)))
    assert granted == 3
    assert len(ledger.spends("patients")) == 9


RACER = """
import sys
from storage.database import open_database
from storage.ledger import Ledger, SpendRow

def at_most_seven(population, existing, new):
    if len(existing) + len(new) > 7:
        raise PermissionError

ledger = Ledger(open_database(sys.argv[1]))
for number in range(5):
    event = f"{sys.argv[2]}/{number}"
    row = SpendRow(event, "p", "c", "r", 1, "d", "gaussian", "example", "add-remove", {})
    try:
        ledger.record_spends_within([row], at_most_seven)
    except PermissionError:
        print("refused")
"""


def test_processes_that_race_cannot_spend_more_than_the_budget(ledger, url):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, str(number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    refused = sum(process.communicate()[0].count("refused") for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(ledger.spends("p")) == 7
    assert refused == 3 * 5 - 7


def test_all_budgets_are_read_at_once(ledger, clinic):
    ledger.add_client(clinic("a", population="north"))
    ledger.add_client(clinic("b", population="south", epsilon=None, delta=None))

    assert ledger.budgets() == {"north": ledger.budget("north")}
