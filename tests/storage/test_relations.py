"""Populations that share records have what was spent on either counted against both."""

import pytest


@pytest.fixture
def shared(ledger):
    """The ledger, where `patients` shares records with `ward`, and `ward` with `study`."""
    assert ledger.relations.add({"patients": {"ward"}, "study": {"ward"}})
    return ledger


def test_a_relation_holds_both_ways_and_not_through_a_third(shared):
    assert shared.relations.of("patients") == {"ward"}
    assert shared.relations.of("ward") == {"patients", "study"}
    assert shared.relations.of("nobody") == frozenset()
    assert shared.relations.all() == {
        "patients": {"ward"},
        "study": {"ward"},
        "ward": {"patients", "study"},
    }


def test_a_relation_that_is_known_is_no_news(shared):
    assert not shared.relations.add({"ward": {"patients"}})
    assert not shared.relations.add({"ward": {"ward"}})
    assert shared.relations.add({"ward": {"patients", "other"}})


def test_what_was_spent_on_a_relative_counts(shared, spend):
    for population in ("patients", "ward", "study", "strangers"):
        shared.record_spend(spend(population, population=population))

    counted = {p: [row.event for row in shared.spends(p)] for p in ("patients", "ward")}

    assert counted == {"patients": ["patients", "ward"], "ward": ["patients", "ward", "study"]}
    assert shared.spent_populations() == {"patients", "ward", "study", "strangers"}


def test_a_check_is_asked_for_every_population_that_a_spend_counts_against(shared, spend):
    old, new = spend("old", population="study"), spend("new", population="ward")
    shared.record_spend(old)
    seen = []

    shared.record_spends_within([new], lambda *given: seen.append(given))

    assert seen == [
        ("patients", [], [new]),
        ("study", [old], [new]),
        ("ward", [old], [new]),
    ]


def test_a_relative_s_refusal_records_nothing(shared, spend):
    def refuse(population, existing, new):
        if population == "patients":
            raise PermissionError

    with pytest.raises(PermissionError):
        shared.record_spends_within([spend("new", population="ward")], refuse)
    assert shared.spends("ward") == []


def test_a_run_without_privacy_is_on_record_once_and_for_ever(ledger):
    ledger.unprotected.add("r1", {"ward", "patients"}, "the board agreed", "ada")
    ledger.unprotected.add("r1", {"ward"}, "another reason", "bob")
    ledger.unprotected.add("r2", {"study"}, "", "ada")

    found = ledger.unprotected.of({"ward", "study"})

    assert [(one.population, one.run, one.reason, one.who) for one in found] == [
        ("ward", "r1", "the board agreed", "ada"),
        ("study", "r2", "", "ada"),
    ]
    assert ledger.unprotected.of(set()) == []


def test_a_budget_has_a_policy(ledger, clinic):
    ledger.add_client(clinic())
    assert ledger.policies() == {"patients": "refuse"}

    ledger.set_budget("patients", 9.0, 1e-6, "shorten")
    ledger.set_budget("patients", 8.0, 1e-6)

    assert ledger.policies() == {"patients": "shorten"}
    with pytest.raises(ValueError, match="policy is refuse, shorten, ask, got 'beg'"):
        ledger.set_budget("patients", 9.0, 1e-6, "beg")
