import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from storage.canonical import NotJson
from storage.database import open_database
from storage.ledger import (
    BadBudget,
    BadClient,
    ClientExists,
    ClientRecord,
    Ledger,
    SpendConflict,
    SpendRow,
    UnknownClient,
    UnknownPopulation,
    UnknownSpend,
)


def clinic(name: str = "clinic-7", **changes) -> ClientRecord:
    record = ClientRecord(
        name=name,
        data="jsonl:/data/notes.jsonl",
        population="patients",
        fields={"text": "note", "label": "dx"},
        num_examples=5310,
        epsilon=8.0,
        delta=1e-5,
        labels={"gpu": "a100"},
    )
    return replace(record, **changes)


def spend(event: str = "run-1/clinic-7/3", **changes) -> SpendRow:
    row = SpendRow(
        event=event,
        population="patients",
        client="clinic-7",
        run="run-1",
        round=3,
        assignment="ab" * 32,
        mechanism="gaussian",
        unit="example",
        adjacency="add-remove",
        parameters={"noise_multiplier": 1.0, "sample_rate": 0.006, "steps": 40},
    )
    return replace(row, **changes)


def allow(population, existing, new):
    pass


# ---- clients


def test_a_registered_client_comes_back(ledger):
    ledger.add_client(clinic())
    found = ledger.client("clinic-7")
    assert found == clinic()
    assert abs(found.created_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_client_without_size_budget_or_labels_comes_back(ledger):
    bare = ClientRecord(name="c", data="builtin:parameter-types", population="c", public=True)
    ledger.add_client(bare)
    assert ledger.client("c") == bare


def test_a_name_is_registered_once(ledger):
    ledger.add_client(clinic())
    with pytest.raises(ClientExists, match="'clinic-7' is registered already; choose another"):
        ledger.add_client(clinic(data="jsonl:/other"))
    assert ledger.client("clinic-7").data == "jsonl:/data/notes.jsonl"


def test_threads_that_register_one_name_leave_one_client(ledger):
    def register(number: int) -> bool:
        try:
            ledger.add_client(clinic(data=f"jsonl:/{number}"))
        except ClientExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(register, range(8))) == 1
    assert len(ledger.clients()) == 1


def test_clients_are_chosen_by_all_labels_and_sorted_by_name(ledger):
    ledger.add_client(clinic("b", labels={"gpu": "a100", "site": "north"}))
    ledger.add_client(clinic("a", labels={"gpu": "a100"}))
    ledger.add_client(clinic("B", labels={}))
    assert [c.name for c in ledger.clients()] == ["B", "a", "b"]
    assert [c.name for c in ledger.clients({"gpu": "a100"})] == ["a", "b"]
    assert [c.name for c in ledger.clients({"gpu": "a100", "site": "north"})] == ["b"]
    assert ledger.clients({"gpu": "h200"}) == []


def test_a_removed_client_is_gone_and_its_spends_stay(ledger):
    ledger.add_client(clinic())
    ledger.record_spend(spend())
    ledger.remove_client("clinic-7")
    assert ledger.clients() == []
    assert ledger.spends("patients") == [spend()]


def test_an_unknown_client_is_refused_with_the_nearest(ledger):
    ledger.add_client(clinic())
    for call in (ledger.client, ledger.remove_client):
        with pytest.raises(UnknownClient, match="'clinic-77'; did you mean 'clinic-7'"):
            call("clinic-77")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "client name 'a/b' must be"),
        ({"name": ""}, "client name '' must be"),
        ({"num_examples": -1}, "num_examples of 'clinic-7' must be >= 0, got -1"),
    ],
)
def test_a_client_that_cannot_be_is_refused(ledger, changes, message):
    with pytest.raises(BadClient, match=message):
        ledger.add_client(clinic(**changes))


# ---- budgets


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        (0.0, 1e-5),
        (float("inf"), 1e-5),
        (float("nan"), 1e-5),
        (8.0, 0.0),
        (8.0, 1.0),
        (8.0, None),
        (None, 1e-5),
    ],
)
def test_a_budget_out_of_range_is_refused(ledger, epsilon, delta):
    with pytest.raises(BadBudget, match="epsilon"):
        ledger.add_client(clinic(epsilon=epsilon, delta=delta))
    ledger.add_client(clinic())
    with pytest.raises(BadBudget, match="epsilon"):
        ledger.set_budget("patients", epsilon, delta)


def test_clients_of_one_population_share_its_budget(ledger):
    ledger.add_client(clinic("a"))
    ledger.add_client(clinic("b"))
    ledger.set_budget("patients", 9.0, 1e-6)
    assert [(c.epsilon, c.delta) for c in ledger.clients()] == [(9.0, 1e-6)] * 2


@pytest.mark.parametrize("budget", [{"epsilon": 9.0}, {"epsilon": None, "delta": None}])
def test_another_budget_for_a_population_is_refused(ledger, budget):
    ledger.add_client(clinic("a"))
    with pytest.raises(BadBudget, match=r"'patients' has the budget ε = 8 \(δ = 1e-05\), got"):
        ledger.add_client(clinic("b", **budget))
    assert [c.name for c in ledger.clients()] == ["a"]


def test_removing_and_adding_a_client_does_not_raise_its_budget(ledger):
    ledger.add_client(clinic())
    ledger.remove_client("clinic-7")
    with pytest.raises(BadBudget, match="'patients' has the budget"):
        ledger.add_client(clinic(epsilon=100.0))


def test_a_budget_of_an_unknown_population_is_refused(ledger):
    ledger.add_client(clinic())
    with pytest.raises(UnknownPopulation, match="did you mean 'patients'"):
        ledger.set_budget("patient", 9.0, 1e-5)


# ---- spends


def test_a_spend_is_recorded_once(ledger):
    assert ledger.record_spend(spend()) is True
    assert ledger.record_spend(spend()) is False
    assert ledger.spends("patients") == [spend()]


def test_a_spend_is_there_after_the_database_is_opened_again(ledger, url):
    ledger.record_spend(spend())
    engine = open_database(url)
    assert Ledger(engine).spends("patients") == [spend()]
    engine.dispose()


def test_spends_are_listed_in_order_by_population_and_by_run(ledger):
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
def test_another_spend_with_the_same_event_is_refused(ledger, change):
    ledger.record_spend(spend())
    with pytest.raises(SpendConflict, match="'run-1/clinic-7/3' is recorded as another spend"):
        ledger.record_spend(spend(**change))
    assert ledger.spends("patients") == [spend()]


def test_a_void_spend_does_not_count(ledger):
    ledger.record_spend(spend("a"))
    ledger.record_spend(spend("b"))
    ledger.void_spend("a", "the worker never started")
    assert ledger.spends("patients") == [spend("b")]
    assert ledger.spends_of_run("run-1") == [spend("b")]


def test_a_void_spend_that_comes_again_counts_again(ledger):
    ledger.record_spend(spend())
    ledger.void_spend(spend().event, "the worker never started")
    checked = []
    new = ledger.record_spends_within([spend()], lambda *given: checked.append(given))
    assert new == [spend()]
    assert checked == [("patients", [], [spend()])]
    assert ledger.spends("patients") == [spend()]


def test_voiding_needs_a_spend_and_a_reason(ledger):
    with pytest.raises(UnknownSpend, match="no spend has the event 'x'"):
        ledger.void_spend("x", "because")
    ledger.record_spend(spend("x"))
    with pytest.raises(ValueError, match="for a reason, got none"):
        ledger.void_spend("x", "")


def test_a_check_sees_what_was_spent_and_what_would_be(ledger):
    old = spend("old")
    ledger.record_spend(old)
    new = [spend("p1"), spend("o1", population="others"), spend("p2")]
    seen = []
    recorded = ledger.record_spends_within([old, *new], lambda *given: seen.append(given))
    assert seen == [("others", [], [new[1]]), ("patients", [old], [new[0], new[2]])]
    assert recorded == new
    assert ledger.spends("patients") == [old, new[0], new[2]]


def test_a_check_that_refuses_one_population_records_none(ledger):
    def refuse(population, existing, new):
        if population == "patients":
            raise PermissionError("budget spent")

    with pytest.raises(PermissionError, match="budget spent"):
        ledger.record_spends_within([spend("a", population="others"), spend("b")], refuse)
    assert ledger.spends("others") == ledger.spends("patients") == []


def test_a_retry_is_not_checked_and_spends_nothing(ledger):
    ledger.record_spends_within([spend()], allow)

    def refuse(population, existing, new):
        raise AssertionError("nothing new is spent")

    assert ledger.record_spends_within([spend(), spend()], refuse) == []


def test_one_event_given_twice_is_one_spend(ledger):
    assert ledger.record_spends_within([spend(), spend()], allow) == [spend()]
    with pytest.raises(SpendConflict):
        ledger.record_spends_within([spend("x"), spend("x", round=9)], allow)


def test_parameters_are_compared_as_they_are_stored(ledger):
    row = spend(parameters={"orders": (2, 3)})
    assert ledger.record_spend(row) is True
    assert ledger.record_spend(row) is False
    with pytest.raises(NotJson, match=r"parameters\.q must be a finite number"):
        ledger.record_spend(spend("y", parameters={"q": float("nan")}))


def test_threads_that_race_cannot_spend_more_than_the_budget(ledger):
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


def test_all_budgets_are_read_at_once(ledger):
    ledger.add_client(clinic("a", population="north"))
    ledger.add_client(clinic("b", population="south", epsilon=None, delta=None))

    assert ledger.budgets() == {"north": ledger.budget("north")}
