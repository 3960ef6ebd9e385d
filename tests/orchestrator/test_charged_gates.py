"""Gates whose suite is what clients hold out: noised, charged once a version, and told so."""

import math

import pytest

from orchestrator import gating
from orchestrator.asking_clients import Question
from orchestrator.config import BadConfig
from orchestrator.continual import Share, fallen
from orchestrator.gate_checks import metrics, tasks
from orchestrator.gate_file import Bounds, TasksCheck, parse_gate
from orchestrator.gate_setting import PrivateData, set_gate
from orchestrator.gate_suite import Scored, question_of, scored
from storage.ledger import ClientRecord

POINTER = ("bot", "production")


@pytest.fixture
def told(workspace, monkeypatch):
    """Stand for clients: what each version scores is told from here, and how often is counted."""
    from orchestrator import gate_suite
    from orchestrator.client_scores import Row, Table
    from strategies.pooled import Estimate

    asked = []

    def answer(home, ref, question, model=None, backend=None):
        asked.append((ref, question))
        found = {"accuracy": Estimate(0.8, 0.02), "loss": Estimate(0.5, 0.1)}
        return Table((Row("a", 100.0, found),), found, 100.0, True)

    monkeypatch.setattr(gate_suite, "score", answer)
    return asked


def document(suite=None, **asked):
    clinics = {"clients": "all", "epsilon": 1.0, "delta": 1e-3}
    return {"suite": {"clinics": suite or clinics}, "aliases": {"production": asked}}


def given(workspace, **asked):
    return set_gate(workspace, "bot", parse_gate(document(**asked)), "ada")


def test_clients_are_asked_once_about_a_version_and_the_evidence_has_the_noise(
    workspace, grow, told
):
    version = grow("bot", private=False)
    given(workspace, metrics={"clinics": {"accuracy": {"at_least": 0.79}}})

    decision = gating.check(workspace, POINTER, "bot:v1")
    again = gating.check(workspace, POINTER, "bot:v1")

    assert [ref for ref, _ in told] == [version]
    assert told[0][1].noised.epsilon == 1.0
    assert decision.passed
    [check] = decision.to_json()["checks"]
    assert (check["found"], check["error"]) == (0.8, 0.02)
    assert "its noise has a standard error of 0.02" in check["said"]
    assert "noise may have decided" in check["said"]
    assert again.to_json() == decision.to_json()


def test_who_was_asked_is_not_asked_again_where_noise_hid_it_all(
    workspace, grow, told, monkeypatch
):
    from orchestrator import gate_suite
    from orchestrator.client_scores import Row, Table

    def hidden(home, ref, question, model=None, backend=None):
        told.append((ref, question))
        return Table((Row("a", 2.0),), {}, 2.0, True)

    monkeypatch.setattr(gate_suite, "score", hidden)
    version = grow("bot", private=False)
    given(workspace, metrics={"clinics": {"accuracy": {"at_least": 0.79}}})
    for _ in range(2):
        [check] = gating.check(workspace, POINTER, "bot:v1").checks
        assert not check.passed
        assert "the noise hides all that clients told; give a larger epsilon" in check.said
    assert [ref for ref, _ in told] == [version]


def test_a_preview_asks_no_client(workspace, grow, told):
    version = grow("bot", private=False)
    gate = parse_gate(document(metrics={"clinics": {"accuracy": {"at_least": 0.5}}}))

    found = scored(workspace, gate, [version])[version]

    assert told == []
    assert found.scores == {}
    assert "each time costs privacy" in found.problems["clinics"]


def test_what_clients_cannot_tell_is_a_check_that_failed(workspace, grow, told):
    grow("bot", private=False)
    given(workspace, metrics={"clinics": {"macro_f1": {"at_least": 0.5}}})

    [check] = gating.check(workspace, POINTER, "bot:v1").checks

    assert not check.passed
    assert "macro_f1 was not measured on clinics (accuracy, loss)" in check.said


def test_clients_that_hold_nothing_out_are_a_check_that_failed(workspace, grow, notes):
    grow("bot", private=False)
    workspace.ledger.add_client(ClientRecord("a", notes("a"), "a"))
    given(workspace, metrics={"clinics": {"accuracy": {"at_least": 0.5}}})

    [check] = gating.check(workspace, POINTER, "bot:v1").checks

    assert not check.passed


def test_what_a_client_holds_out_elsewhere_is_no_data_set_of_a_suite(workspace, notes):
    held = notes("held")
    workspace.ledger.add_client(ClientRecord("a", notes("a"), "a", holdout=held))
    with pytest.raises(PrivateData, match="has the data of client 'a'"):
        set_gate(workspace, "bot", parse_gate(document({"data": held})), "ada")


@pytest.mark.parametrize(
    ("one", "says"),
    [
        ({"clients": "all"}, "is scored in noise alone; give epsilon"),
        ({"clients": "all", "epsilon": 1, "data": "jsonl:x"}, "give either data"),
        ({"data": "jsonl:x", "epsilon": 1}, "are of clients' scores"),
        ({"clients": "all", "epsilon": 1, "generate": 4}, "clients score all they hold"),
    ],
)
def test_what_a_suite_cannot_ask_of_clients_is_refused(one, says):
    with pytest.raises(BadConfig, match=says):
        parse_gate(document(one))


def test_the_same_question_has_the_same_place_among_a_versions_metrics():
    [one] = parse_gate(document()).suite.values()
    question = question_of(one)
    assert question.prefix("x") == question_of(one).prefix("x")
    assert question.prefix("x") != Question("all").prefix("x")
    assert question.noised.delta == 1e-3


def scores(accuracy, error=0.0, size=1000.0):
    values = {"accuracy": accuracy, "num_examples": size}
    return Scored("v", {"c": values | ({"accuracy_error": error} if error else {})}, {})


def test_a_verdict_says_where_noise_may_have_decided_it():
    bound = {"c": {"accuracy": Bounds(worse_by=0.01)}}
    [near] = metrics(bound, scores(0.80, 0.01), scores(0.82, 0.01))
    [far] = metrics(bound, scores(0.60, 0.01), scores(0.82, 0.01))
    [exact] = metrics(bound, scores(0.80), scores(0.82))
    assert near.error == pytest.approx(math.hypot(0.01, 0.01))
    assert "noise may have decided" in near.said
    assert "noise may have decided" not in far.said
    assert (exact.error, "noise" in exact.said) == (0.0, False)


def test_noise_widens_the_interval_of_a_fall():
    before, after = Share(0.9, 1000), Share(0.88, 1000)
    quiet, loud = (fallen("c", before, after, 0.05, noise=noise) for noise in (0.0, 0.05))
    assert (quiet.verdict, loud.verdict) == ("holds", "unclear")
    assert loud.high == pytest.approx(0.02 + math.hypot(quiet.high - 0.02, 1.959964 * 0.05))
    [check] = tasks(TasksCheck(tau=0.05), scores(0.88, 0.04), scores(0.9, 0.03))
    assert not check.passed
    assert check.error == pytest.approx(0.05)
