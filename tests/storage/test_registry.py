"""Registered clients and their populations' budgets, on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from storage.ledger import (
    BadBudget,
    BadClient,
    ClientExists,
    ClientRecord,
    UnknownClient,
    UnknownPopulation,
)

# ---- clients


def test_a_registered_client_comes_back(ledger, clinic):
    ledger.add_client(clinic())
    found = ledger.client("clinic-7")
    assert found == clinic()
    assert abs(found.created_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_client_without_size_budget_or_labels_comes_back(ledger):
    bare = ClientRecord(name="c", data="builtin:parameter-types", population="c", public=True)
    ledger.add_client(bare)
    assert ledger.client("c") == bare


def test_a_name_is_registered_once(ledger, clinic):
    ledger.add_client(clinic())
    with pytest.raises(ClientExists, match="'clinic-7' is registered already; choose another"):
        ledger.add_client(clinic(data="jsonl:/other"))
    assert ledger.client("clinic-7").data == "jsonl:/data/notes.jsonl"


def test_threads_that_register_one_name_leave_one_client(ledger, clinic):
    def register(number: int) -> bool:
        try:
            ledger.add_client(clinic(data=f"jsonl:/{number}"))
        except ClientExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(register, range(8))) == 1
    assert len(ledger.clients()) == 1


def test_clients_are_chosen_by_all_labels_and_sorted_by_name(ledger, clinic):
    ledger.add_client(clinic("b", labels={"gpu": "a100", "site": "north"}))
    ledger.add_client(clinic("a", labels={"gpu": "a100"}))
    ledger.add_client(clinic("B", labels={}))
    assert [c.name for c in ledger.clients()] == ["B", "a", "b"]
    assert [c.name for c in ledger.clients({"gpu": "a100"})] == ["a", "b"]
    assert [c.name for c in ledger.clients({"gpu": "a100", "site": "north"})] == ["b"]
    assert ledger.clients({"gpu": "h200"}) == []


def test_an_unknown_client_is_refused_with_the_nearest(ledger, clinic):
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
def test_a_client_that_cannot_be_is_refused(ledger, changes, message, clinic):
    with pytest.raises(BadClient, match=message):
        ledger.add_client(clinic(**changes))


# ---- pages and labels


@pytest.fixture
def crowd(ledger, clinic):
    """Nine clients, their names in the order of bytes: capitals, digits, small letters."""
    names = ["A", "Z", "a-1", "a.1", "a1", "a_1", "aa", "b", "node-10"]
    ledger.add_clients([clinic(name, population=name, labels={"site": name[0]}) for name in names])
    return names


def test_pages_follow_each_other_in_the_order_of_python(ledger, crowd):
    found, page = [], ledger.clients(limit=4)
    while page:
        found += [record.name for record in page]
        page = ledger.clients(limit=4, after=found[-1])
    assert found == sorted(crowd)
    assert ledger.client_names() == set(crowd)


def test_a_page_after_a_name_that_nobody_has_begins_with_the_next(ledger, crowd):
    assert [c.name for c in ledger.clients(limit=2, after="a2")] == ["a_1", "aa"]


def test_a_page_of_those_with_a_label_holds_only_them(ledger, crowd):
    wanted = [name for name in sorted(crowd) if name.startswith("a")]
    first = ledger.clients({"site": "a"}, limit=3)
    rest = ledger.clients({"site": "a"}, limit=3, after=first[-1].name)
    assert [c.name for c in (*first, *rest)] == wanted


@pytest.mark.parametrize(
    ("labels", "selector", "found"),
    [
        ({":": ",", "b": "c"}, {":": ","}, True),
        ({"a": ":", "b": "c"}, {":": ","}, False),  # as text the one holds the other
        ({'say "x"': "ü\\"}, {'say "x"': "ü\\"}, True),
        ({"a.b": "1"}, {"a.b": "1"}, True),
        ({"a": "1"}, {"a": "2"}, False),
        ({"a": "%"}, {"a": "x"}, False),
        ({"$": "*"}, {"$": "*"}, True),
        ({}, {"a": "1"}, False),
        ({"a": "1"}, {}, True),
    ],
)
def test_a_label_is_found_whatever_is_written_in_it(ledger, labels, selector, found, clinic):
    ledger.add_client(clinic(labels=labels))
    assert [c.name for c in ledger.clients(selector)] == ["clinic-7"] * found


# ---- many at once


def test_many_clients_are_registered_at_once(ledger, clinic):
    records = [clinic(f"node-{n:04}", population=f"people-{n % 700}") for n in range(1500)]
    ledger.add_clients(records)
    assert ledger.clients() == records
    assert len(ledger.budgets()) == 700


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"name": "a/b"}, BadClient, "c.csv line 3: client name 'a/b' must be"),
        ({"name": "old"}, ClientExists, "c.csv line 3: a client called 'old' is registered"),
        ({"name": "new"}, ClientExists, "line 3: two clients are called 'new', .* c.csv line 2"),
        ({"name": "x", "epsilon": 9.0}, BadBudget, "c.csv line 3: population 'patients' has"),
        ({"name": "x", "delta": None}, BadBudget, "c.csv line 3: a budget is epsilon and delta"),
        ({"name": "x", "labels": {"a": "\0"}}, BadClient, "c.csv line 3: 'x' has .* NUL"),
    ],
)
def test_where_one_of_many_is_refused_none_is_registered(ledger, wrong, error, message, clinic):
    ledger.add_client(clinic("old"))
    places = ["c.csv line 2", "c.csv line 3"]
    with pytest.raises(error, match=message):
        ledger.add_clients([clinic("new", population="others"), clinic(**wrong)], places)
    assert ledger.client_names() == {"old"}
    assert set(ledger.budgets()) == {"patients"}


def test_threads_that_register_many_of_the_same_leave_one_of_each(ledger, clinic):
    def register(number: int) -> bool:
        try:
            ledger.add_clients([clinic(f"node-{n}") for n in range(number, number + 5)])
        except ClientExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(register, range(4))) == 1
    assert len(ledger.clients()) == 5


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
def test_a_budget_out_of_range_is_refused(ledger, epsilon, delta, clinic):
    with pytest.raises(BadBudget, match="epsilon"):
        ledger.add_client(clinic(epsilon=epsilon, delta=delta))
    ledger.add_client(clinic())
    with pytest.raises(BadBudget, match="epsilon"):
        ledger.set_budget("patients", epsilon, delta)


def test_clients_of_one_population_share_its_budget(ledger, clinic):
    ledger.add_client(clinic("a"))
    ledger.add_client(clinic("b"))
    ledger.set_budget("patients", 9.0, 1e-6)
    assert [(c.epsilon, c.delta) for c in ledger.clients()] == [(9.0, 1e-6)] * 2


@pytest.mark.parametrize("budget", [{"epsilon": 9.0}, {"epsilon": None, "delta": None}])
def test_another_budget_for_a_population_is_refused(ledger, budget, clinic):
    ledger.add_client(clinic("a"))
    with pytest.raises(BadBudget, match=r"'patients' has the budget ε = 8 \(δ = 1e-05\), got"):
        ledger.add_client(clinic("b", **budget))
    assert [c.name for c in ledger.clients()] == ["a"]


def test_removing_and_adding_a_client_does_not_raise_its_budget(ledger, clinic):
    ledger.add_client(clinic())
    ledger.remove_client("clinic-7")
    with pytest.raises(BadBudget, match="'patients' has the budget"):
        ledger.add_client(clinic(epsilon=100.0))


def test_a_budget_of_an_unknown_population_is_refused(ledger, clinic):
    ledger.add_client(clinic())
    with pytest.raises(UnknownPopulation, match="did you mean 'patients'"):
        ledger.set_budget("patient", 9.0, 1e-5)
