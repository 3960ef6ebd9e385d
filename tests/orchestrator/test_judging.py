"""Runs whose versions clients score: on what they hold out, noised and charged under privacy."""

import json
from dataclasses import replace

import pytest

from clients.accounting import epsilon
from orchestrator import service
from orchestrator.budgets import planned_spends
from orchestrator.config import BadConfig, parse_config
from orchestrator.epsilons import spend_from_row
from orchestrator.federation import Federation
from orchestrator.judging import scorers
from orchestrator.launch import make_plan
from orchestrator.plan import Plan
from orchestrator.score_rules import is_of_scores, most_scores
from orchestrator.steering import RunRefused, extend
from orchestrator.workspace import open_workspace

LABELS = ["cat", "dog", "model", "rank"]
DP = {"epsilon": 8.0, "delta": 1e-2}


@pytest.fixture
def config(tmp_path, tiny_encoder):
    """Return a function that makes the config of a run of two simulated clients."""
    rows = [{"text": f"{LABELS[i % 4]} {i} learns", "label": LABELS[i % 4]} for i in range(80)]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        **{"name": "task-1", "labels": LABELS, "rounds": 3, "steps": 2, "batch_size": 4},
        "model": {"id": str(tiny_encoder), "max_length": 16},
        "adapter": {"name": "lora", "r": 2, "layers": [0]},
        "clients": {"simulate": {"data": f"jsonl:{path}", "parts": 2, "holdout": 0.3}},
        "evaluate": {"clients": "all", "every": 2},
        **{"strategy": "ffa-lora", "backend": "inline"},
    }
    return lambda **changes: parse_config(base | changes)


def private(own=2.0, **changes):
    return {"privacy": DP | changes, "evaluate": {"clients": "all", "every": 2, "epsilon": own}}


def events(home, kind):
    [record] = home.ledger.runs()
    return [event.data for event in home.ledger.events(record.id) if event.kind == kind]


def test_clients_score_every_so_many_rounds_and_the_last(config, workspace):
    version = service.launch(workspace, config())
    scored = events(workspace, "evaluated")
    assert [one["round"] for one in scored] == [2, 3]
    assert set(scored[0]) == {"round", "accuracy", "macro_f1", "loss"}
    by_client = events(workspace, "scored by clients")
    assert [set(one["clients"]) for one in by_client] == [{"part-0", "part-1"}] * 2
    kept = workspace.store.version(version).metrics
    assert kept["accuracy"] == scored[-1]["accuracy"]


def test_private_scores_are_charged_so_often_and_all_of_a_run_keeps_to_its_epsilon(
    config, workspace
):
    version = service.launch(workspace, config(**private()))
    [record] = workspace.ledger.runs()
    rows = workspace.ledger.spends_of_run(record.id)
    for client in ("part-0", "part-1"):
        own = [spend_from_row(row) for row in rows if row.client == client]
        told = [one for one in own if one.parameters["sample_rate"] == 1.0]
        assert len(told) == 2
        assert len(own) == 5
        assert 1.98 < epsilon(told, DP["delta"]) <= 2.0
        assert 7.9 < epsilon(own, DP["delta"]) <= 8.0
    scored = events(workspace, "evaluated")
    assert set(scored[0]) == {"round", "accuracy", "accuracy_error", "loss", "loss_error"}
    assert workspace.store.version(version).metrics["accuracy_error"] > 0


def test_what_a_run_plans_to_spend_has_its_scores(config, workspace):
    plan = make_plan(config(**private()), workspace.store, workspace.ledger)
    for spends in planned_spends(plan).values():
        assert [one.parameters["steps"] for one in spends] == [6.0, 2.0]
        assert 7.9 < epsilon(spends, DP["delta"]) <= 8.0
    without = replace(plan, config=config(privacy=DP, evaluate=None))
    assert all(who.scoring is not None for who in plan.participants)
    assert Plan.from_json(plan.to_json()) == plan
    assert scorers(without) == []


def test_scores_end_a_run_that_gets_no_better(config, workspace):
    stop = {"metric": "loss", "patience": 1, "min_delta": 100.0}
    service.launch(workspace, config(stop=stop, evaluate={"clients": "all"}))
    assert [one["round"] for one in events(workspace, "evaluated")] == [1, 2]
    assert events(workspace, "stopped")


def test_a_run_that_dies_before_its_scores_are_on_the_log_costs_them_once(
    config, workspace, tmp_path, monkeypatch
):
    """What clients told is told again; the spends are the same events."""
    simulate = config().clients.simulate.model_dump() | {"public": True}  # split alike anywhere
    chosen = config(**private(insecure_seed=3), clients={"simulate": simulate})
    other = open_workspace(tmp_path / "other")
    whole = service.launch(other, chosen)

    class Dies(Exception):
        pass

    log = Federation._log

    def dying(self, kind, data, **fields):
        if kind == "scored by clients" and data["round"] == 2:
            raise Dies
        log(self, kind, data, **fields)

    monkeypatch.setattr(Federation, "_log", dying)
    with pytest.raises(Dies):
        service.launch(workspace, chosen)
    monkeypatch.undo()
    [record] = workspace.ledger.runs()
    spent = {row.event for row in workspace.ledger.spends_of_run(record.id)}
    assert service.resume(workspace, record.id) == whole
    after = {row.event for row in workspace.ledger.spends_of_run(record.id)}
    assert spent < after
    assert len(after) == 10
    assert events(workspace, "evaluated") == events(other, "evaluated")


def test_more_rounds_with_more_scores_are_refused(config, workspace):
    service.launch(workspace, config(**private(max_participations=3)))
    [record] = workspace.ledger.runs()
    with pytest.raises(RunRefused, match="clients tell scores 2 times for ε = 2"):
        extend(workspace, record.id, "+2")


def test_the_last_round_of_fewer_was_scored_and_counts_when_there_are_to_be_more(config, workspace):
    """Of 4 rounds, each third is 3 and 4 the last; of 5 it would be 3 and 5, besides 4."""
    given = private(max_participations=4)
    given["evaluate"]["every"] = 3
    service.launch(workspace, config(rounds=4, **given))
    [record] = workspace.ledger.runs()
    plan = Plan.from_json(workspace.ledger.plan(record.id))
    rows = workspace.ledger.spends_of_run(record.id)
    assert [most_scores(plan, rows, done, 5) for done in (2, 4)] == [3, 3]
    assert [most_scores(plan, (), done, total) for done, total in ((2, 5), (0, 4))] == [2, 2]
    with pytest.raises(RunRefused, match="5 rounds would ask more often"):
        extend(workspace, record.id, "+1")


def test_a_score_is_no_round_of_training(config, workspace):
    """Each round trains one of two clients, and both score it."""
    given = private(max_participations=2)
    given["evaluate"]["every"] = 1
    service.launch(workspace, config(rounds=2, cohort=1, **given))
    [record] = workspace.ledger.runs()
    plan = Plan.from_json(workspace.ledger.plan(record.id))
    rows = workspace.ledger.spends_of_run(record.id)
    trained = [row for row in rows if not is_of_scores(row, plan)]
    assert (len(rows), len(trained)) == (6, 2)
    assert {row.parameters["steps"] for row in trained} == {2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": DP}, "evaluate.epsilon: under privacy clients tell scores in noise"),
        (private(8.0), "leaves nothing of privacy.epsilon"),
        ({"evaluate": {"clients": "all", "epsilon": 1.0}}, "without privacy training has no ε"),
        ({"asynchronous": {"buffer": 1, "concurrency": 1}}, "may still train while it is asked"),
        (
            {"privacy": {"level": "client", "epsilon": 6, "delta": 1e-3, "clip": 0.1}},
            "cannot be added to what privacy.level",
        ),
        (private() | {"stop": {"metric": "macro_f1"}}, "is not among what clients tell"),
        ({"evaluate": {"clients": "all", "data": "jsonl:x"}}, "give either data"),
        ({"evaluate": {"data": "jsonl:x", "epsilon": 1.0}}, "are of what clients tell"),
    ],
)
def test_what_clients_scores_do_not_go_with_is_refused(config, changes, says):
    with pytest.raises(BadConfig, match=says):
        config(**changes)


def test_a_run_whose_clients_hold_nothing_out_is_refused(config, workspace):
    simulate = {**config().clients.simulate.model_dump(), "holdout": None}
    with pytest.raises(ValueError, match="holds anything out"):
        make_plan(config(clients={"simulate": simulate}), workspace.store, workspace.ledger)
