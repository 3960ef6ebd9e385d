"""A sweep's runs in the queue: only what is missing, and never over a budget."""

import pytest
import yaml

from clients.accounting import BudgetSpent
from orchestrator.config import BadConfig
from orchestrator.sweep import Sweep, points
from orchestrator.sweeping import forecast, queue, standing
from storage.ledger import ClientRecord, Queueing

DP = {"noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp"}


@pytest.fixture
def runs(document, tiny_encoder):
    """Return a function that gives the runs of a sweep on the tiny encoder."""

    def make(base=None, **sweep):
        model = {"id": str(tiny_encoder), "max_length": 16}
        changes = {"model": model, "steps": 2, "adapter": {"name": "lora", "r": 2}}
        changes["optimizer"] = {"name": "adamw", "lr": 0.05}
        whole = document(**changes | (base or {}))
        return points(Sweep(name="rates", base={}, **sweep), whole)

    return make


def test_the_same_sweep_again_adds_only_what_is_missing(home, runs):
    few, many = runs(seeds=1), runs(seeds=3)

    assert queue(home, forecast(home, "rates", few), Queueing(2, {"gpu": "a100"})) == 1
    assert queue(home, forecast(home, "rates", many), Queueing()) == 2
    assert queue(home, forecast(home, "rates", many), Queueing()) == 0

    found = standing(home, "rates", many)
    assert found.counts() == {"queued": 3}
    first = found.records[few[0].name]
    assert (first.priority, first.labels) == (2, {"gpu": "a100", "sweep": "rates"})


def test_another_sweeps_runs_are_not_this_ones(home, runs):
    queue(home, forecast(home, "other", runs(seeds=1)), Queueing())
    assert standing(home, "rates", runs(seeds=1)).counts() == {"missing": 1}


def test_a_failed_run_is_told_and_queued_again_when_asked(home, runs):
    chosen = runs(seeds=2)
    queue(home, forecast(home, "rates", chosen), Queueing())
    failed = standing(home, "rates", chosen).records[chosen[0].name].id
    home.ledger.record(failed, "failed", {}, status="failed", error="out of memory")

    again = forecast(home, "rates", chosen)
    assert again.counts() == {"failed": 1, "queued": 1}
    assert queue(home, again, Queueing()) == 0
    assert standing(home, "rates", chosen).counts() == {"failed": 1, "queued": 1}
    queue(home, again, Queueing(), retry=True)
    assert standing(home, "rates", chosen).counts() == {"queued": 2}


def test_what_planning_refuses_is_told_of_every_setting_before_anything_is_queued(home, runs):
    grid = {"strategy": ["fedavg", "scaffold"], "regularizers": [[], ["o-lora"]]}
    chosen = runs(grid=grid, base={"privacy": None, "quorum": 7})

    with pytest.raises(BadConfig) as error:
        forecast(home, "rates", chosen)

    told = str(error.value)
    assert "strategy=scaffold, regularizers=none" in told
    assert "strategy=fedavg, regularizers=none" in told
    assert "quorum: 7 is more than the 2 clients" in told
    assert home.ledger.runs() == []


def test_the_cost_is_composed_over_all_runs_and_what_was_spent(home, runs):
    one = forecast(home, "rates", runs(seeds=1, base={"privacy": DP})).costs
    three = forecast(home, "rates", runs(seeds=3, base={"privacy": DP})).costs

    assert [(c.after.population, c.runs, c.before) for c in three] == [("a", 3, 0), ("b", 3, 0)]
    assert 3 * one[0].after.epsilon > three[0].after.epsilon > one[0].after.epsilon


def test_the_cost_of_a_run_is_the_same_before_and_after_it_is_queued(home, runs):
    chosen = runs(seeds=2, base={"privacy": DP})
    before = forecast(home, "rates", chosen)
    queue(home, before, Queueing())
    assert forecast(home, "rates", chosen).costs == before.costs


def test_a_sweep_that_would_pass_a_budget_is_refused_whole(workspace, notes, runs):
    workspace.ledger.add_client(ClientRecord("a", notes("a"), "a", num_examples=12))
    one = forecast(workspace, "rates", runs(seeds=1, base={"privacy": DP})).costs[0].after
    workspace.ledger.set_budget("a", one.epsilon * 1.2, one.delta)

    assert forecast(workspace, "rates", runs(seeds=1, base={"privacy": DP})).costs[0].runs == 1
    with pytest.raises(BudgetSpent, match="the 4 runs of this sweep would bring it to"):
        forecast(workspace, "rates", runs(seeds=4, base={"privacy": DP}))
    assert workspace.ledger.runs() == []


def test_data_that_are_neither_public_nor_protected_are_named(home, runs):
    assert forecast(home, "rates", runs(seeds=1)).unprotected == ("a", "b")


def test_a_sweep_is_run_from_the_command_line(ok, read, run_yaml, tmp_path):
    evaluate = {
        "data": yaml.safe_load(run_yaml(rounds=1).read_text())["clients"]["simulate"]["data"]
    }
    run_yaml(rounds=1, evaluate=evaluate)
    file = tmp_path / "sweep.yaml"
    file.write_text("name: ranks\nbase: run.yaml\ngrid: {adapter.r: [1, 2]}\n")

    assert "2 missing" in ok("sweep", file, "--dry-run")
    assert read("runs", "list") == []
    assert "2 queued" in ok("sweep", file)
    assert "ranks: 2 runs: 2 completed" in ok("sweep", file, "--run")
    again = read("sweep", file, "--status")
    assert [(r["values"], r["status"]) for r in again["runs"]] == [
        ({"adapter.r": 1}, "completed"),
        ({"adapter.r": 2}, "completed"),
    ]
    assert len(read("runs", "list")) == 2
