"""Which fault happens to whom and when: a function of seed, round and client alone."""

import pytest

from orchestrator.config import BadConfig, parse_config
from orchestrator.faults import FaultAt, Faults, client_fault, host_fault, is_faulty

CLIENTS = [f"c-{i}" for i in range(1000)]
SIMULATED = {"simulate": {"data": "jsonl:/a.jsonl", "by": "iid", "parts": 3}}


def test_about_the_share_of_clients_is_faulty_and_the_same_ones_in_every_round():
    faults = Faults(clients=0.1, kinds=("nan", "drop"))
    faulty = {c for c in CLIENTS if is_faulty(faults, c)}
    assert 70 <= len(faulty) <= 130
    for round_ in (1, 2, 7):
        assert {c for c in CLIENTS if client_fault(faults, round_, c)} == faulty


def test_a_faulty_client_fails_in_another_way_in_another_round():
    faults = Faults(clients=1.0, kinds=("nan", "drop", "replay"))
    found = [client_fault(faults, round_, "c-1") for round_ in range(1, 40)]
    assert set(found) == {"nan", "drop", "replay"}
    assert found == [client_fault(faults, round_, "c-1") for round_ in range(1, 40)]


def test_another_seed_makes_others_faulty():
    faulty = [
        {c for c in CLIENTS if is_faulty(Faults(seed=seed, kinds=("nan",)), c)} for seed in (0, 1)
    ]
    assert faulty[0] != faulty[1]


def test_a_fault_that_is_listed_happens_there_and_nowhere_else():
    faults = Faults(
        at=(FaultAt(kind="nan", client="c-3", round=2), FaultAt(kind="full-disk", round=2))
    )
    rounds = range(1, 5)
    assert [(r, c) for r in rounds for c in CLIENTS[:9] if client_fault(faults, r, c)] == [
        (2, "c-3")
    ]
    assert [host_fault(faults, r) for r in rounds] == [None, "full-disk", None, None]


def test_the_coordinators_kinds_do_not_happen_to_clients_nor_theirs_to_it():
    faults = Faults(clients=1.0, rounds=1.0, kinds=("corrupt-blob", "crash"))
    assert {client_fault(faults, 1, c) for c in CLIENTS} == {"crash"}
    assert {host_fault(faults, r) for r in range(1, 50)} == {"corrupt-blob"}
    only_host = Faults(clients=1.0, kinds=("corrupt-blob",))
    assert not any(is_faulty(only_host, c) for c in CLIENTS)


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"kinds": []}, "give kinds, such as"),
        ({"kinds": ["explode"]}, "^faults.kinds.0: input should be 'crash', .* got 'explode'$"),
        ({"kinds": ["nan"], "clients": 1.5}, "less than or equal to 1"),
        ({"kinds": ["crash", "nan"]}, "crash takes the process with it"),
        ([{"kind": "nan", "round": 1}], "nan happens to a client; say which"),
        ([{"kind": "full-disk", "round": 1, "client": "a"}], "happens to the coordinator"),
        ([{"kind": "nan", "round": 3, "client": "a"}], "for round 3, and there are 2 rounds"),
        ([{"kind": "nan", "round": 0, "client": "a"}], "greater than or equal to 1"),
        ({"kind": ["nan"]}, "there is no such option; did you mean 'kinds'"),
    ],
)
def test_faults_that_cannot_be_are_refused_with_the_reason(document, faults, why):
    with pytest.raises(BadConfig, match=why):
        parse_config(document(clients=SIMULATED, faults=faults))


def test_faults_are_refused_outside_a_simulation(document):
    with pytest.raises(BadConfig, match="they are for simulations, and this run's clients"):
        parse_config(document(faults={"kinds": ["nan"]}))
