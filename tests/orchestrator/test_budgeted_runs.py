"""Whole runs keep within budgets: at the round that would pass one, and against each other."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from clients.accounting import epsilon
from clients.charges import spend_of
from orchestrator import service
from orchestrator.budgets import planned_spends
from orchestrator.epsilons import spend_from_row
from orchestrator.federation import Federation, RoundFailed
from orchestrator.launch import make_plan as plan_of
from orchestrator.service import open_workspace
from storage.ledger import ClientRecord

DP = {"noise_multiplier": 2.0, "delta": 1e-3}


def spent(ledger, population):
    rows = ledger.spends(population)
    return epsilon([spend_from_row(row) for row in rows], 1e-3) if rows else 0.0


@pytest.fixture
def home(workspace, tmp_path):
    """A workspace with two clients that share no record."""
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"cat {name} {i}", "label": "cat"} for i in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        workspace.ledger.add_client(ClientRecord(name, f"jsonl:{path}", name, num_examples=12))
    return workspace


@pytest.fixture
def one_round(home, tiny):
    """What a round of a run on the two clients spends of each."""
    plan = plan_of(tiny(privacy=DP), home.store, home.ledger)
    return epsilon(planned_spends(plan)["a"], 1e-3)


def test_a_run_goes_on_without_a_client_from_the_round_that_would_pass_its_budget(
    home, tiny, one_round
):
    home.ledger.set_budget("a", 1.01 * one_round, 1e-3, "shorten")

    version = service.launch(home, tiny(rounds=2, privacy=DP))

    run = home.ledger.runs()[0]
    by_round = {
        v.recipe["round"]: [leaf["client"] for leaf in v.recipe["updates"]]
        for v in home.store.versions(limit=10)
        if v.recipe["kind"] == "round"
    }
    assert (run.status, run.version) == ("completed", version)
    assert by_round == {1: ["a", "b"], 2: ["b"]}
    [refused] = [e.data for e in home.ledger.events(run.id) if e.kind == "refused"]
    assert (refused["client"], refused["round"], refused["fault"]) == ("a", 2, False)
    assert f"a has spent ε = {one_round:.2f} of {1.01 * one_round:g}" in refused["reason"]
    assert 0 < spent(home.ledger, "a") <= 1.01 * one_round < spent(home.ledger, "b")


def test_a_run_whose_last_client_would_pass_its_budget_fails_and_sends_nothing(
    home, tiny, one_round
):
    config = tiny(rounds=2, privacy=DP, clients={"names": ["a"]})
    run = service.submit(home, config)
    home.ledger.set_budget("a", 1.01 * one_round, 1e-3)  # since it was planned

    with pytest.raises(RoundFailed, match=r"round 2: no update .* a has spent ε = "):
        service.resume(home, run)

    assert home.ledger.run(run).round == 1
    assert {row.round for row in home.ledger.spends("a")} == {1}


def test_of_two_whole_runs_that_race_for_a_budget_one_gets_it(
    workspace, tiny, notes, imagined, one_round
):
    records = [ClientRecord(n, notes(n, 12), "ward", num_examples=12) for n in ("x", "y")]
    workspace.ledger.add_clients(records)
    workspace.ledger.set_budget("ward", 1.01 * one_round, 1e-3)
    backend = imagined()
    answer = backend.answer

    def private(asked):
        update = answer(asked)
        if asked.action != "train":
            return update
        return replace(update, num_examples=asked.num_examples, spends=(spend_of(asked),))

    plans = []
    for name in ("x", "y"):
        config = tiny(name=f"of-{name}", privacy=DP, clients={"names": [name]}, strategy="ffa-lora")
        plan = replace(plan_of(config, workspace.store, workspace.ledger), run=f"run-{name}")
        workspace.ledger.create_run(plan.run, plan.config.name, {"privacy": DP}, plan.to_json())
        plans.append(plan)

    def driven(plan):
        own = open_workspace(workspace.home)
        clients = type(backend)(backend.first)
        clients.answer = private
        try:
            return Federation(plan, own.store, own.ledger, clients, own.home).run()
        except RoundFailed as error:
            return error
        finally:
            own.close()

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(driven, plans))

    failed = [one for one in ended if isinstance(one, RoundFailed)]
    assert len(failed) == 1
    assert "has spent ε = " in str(failed[0])
    assert len(workspace.ledger.spends("ward")) == 1


def test_data_under_another_name_are_refused_from_the_command_line(
    ok, refused, run_yaml, notes, tmp_path, one_round
):
    data = notes("ward", size=12)
    path = tmp_path / "again.jsonl"
    ok("clients", "add", "ward", "--data", data, "--epsilon", 1.01 * one_round, "--delta", 1e-3)
    changes = {"privacy": DP, "rounds": 1, "steps": 2, "batch_size": 4}
    ok("run", run_yaml(clients={"names": ["ward"]}, **changes))
    rows = (tmp_path / "ward.jsonl").read_text().splitlines()
    more = json.dumps({"text": "one row that nobody had", "label": "cat"})
    for number, lines in enumerate((rows, [*rows, more], rows[3:8])):
        path.write_text("\n".join(lines) + "\n")
        name = f"other-{number}"
        ok("clients", "add", name, "--data", f"jsonl:{path}")
        said = refused("run", run_yaml(clients={"names": [name]}, **changes))
        assert f"population 'ward', with which its own '{name}' shares records" in said
