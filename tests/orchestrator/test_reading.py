"""Readings: what a run remembers of its clients' data goes the way of a round."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from clients.assignment import DataSpec
from clients.regularizers import REGULARIZERS, Regularizer
from clients.worker import perform
from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.federation import Federation, RoundFailed
from orchestrator.launch import make_plan as plan_of
from orchestrator.privacy_report import _is_bare
from orchestrator.service import open_workspace
from storage.ledger import ClientRecord
from strategies.plugins import Plugin

FOUR = ("a", "b", "c", "d")
EWC = {"strategy": "fedavg", "regularizers": ["ewc"], "retention": "all", "rounds": 2}
SI = {**EWC, "regularizers": ["si"]}
DP = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}


@dataclass(frozen=True)
class First(Regularizer):
    """Start from, and remember, what the clients' layers are given before round 1."""

    def prepare_from_data(self, reading, memory):
        found = {}
        for batch in reading.inputs():
            for layer, rows in batch.items():
                found[f"{layer}.sum"] = found.get(f"{layer}.sum", 0) + rows.sum(0)
        return found

    def parts(self, when, params, returned):
        names = [n for n in params if n.endswith(".lora_A.weight")]
        return {
            f"{n.removesuffix('.lora_A.weight')}.sum": (params[n].shape[1],)
            for n in names
            if when == "prepare"
        }

    def combine(self, when, params, memory, updates):
        grown = dict(memory)
        for update in updates:
            for name, part in update.tensors.items():
                grown[name] = grown.get(name, 0) + part
        return grown

    def initialise(self, adapter, memory):
        return {
            n: memory[key].expand_as(t).clone()
            if (key := n.replace(".lora_A.weight", ".sum")) in memory
            else t
            for n, t in adapter.items()
        }


@pytest.fixture(autouse=True)
def first(monkeypatch):
    """A method that reads before round 1, among the others."""
    plugin = Plugin("regularizer", "first", First, "Start from data.", "", family=REGULARIZERS)
    monkeypatch.setitem(REGULARIZERS._plugins, "first", plugin)


@pytest.fixture
def three(home, notes):
    """Three registered clients of unlike sizes."""
    data = notes("c", size=20, shift=3)
    home.ledger.add_client(ClientRecord("c", data, "c", num_examples=20))
    return home


@pytest.fixture
def federation(tmp_path, make_plan, imagined):
    """Return a function that makes a run of imagined clients, or one to go on with it.

    With ``copies``, each event leaves a copy of the home as a process that dies at it would.
    """

    def make(home="home", backend=None, copies=False, **changes):
        plan = make_plan(clients=FOUR, **changes)
        workspace = open_workspace(tmp_path / home)
        if not workspace.ledger.runs():
            config = plan.config.model_dump(mode="json")
            workspace.ledger.create_run("run-1", "task-1", config, plan.to_json())

        def observe(kind, data):
            log = [e.kind for e in workspace.ledger.events("run-1")]
            if copies and "reading" in log and kind == log[-1]:
                shutil.copytree(workspace.home, tmp_path / f"{home}-{len(log) - 1}")

        used = backend or imagined()
        made = Federation(plan, workspace.store, workspace.ledger, used, workspace.home, observe)
        made._collector.clock = lambda: used.now
        return made

    return make


def events(run, *kinds):
    found = run.ledger.events("run-1")
    return [e.data for e in found if e.kind in kinds] if kinds else found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- whole runs on text -----------------------------------------------------------------------


def test_the_memory_of_clients_is_that_of_one_who_has_all_their_data(three, tiny):
    version = service.launch(three, tiny(**EWC))
    found, memory = three.store.version(version), three.store.memory(version)
    [base] = [parent.id for parent in found.parents]
    tensors = three.store.tensors(version)

    uris = [three.ledger.client(name).data for name in "abc"]
    rows = "".join(Path(uri.removeprefix("jsonl:")).read_text() for uri in uris)
    pooled = three.home / "pooled.jsonl"
    pooled.write_text(rows)
    plan = plan_of(tiny(**EWC), three.store, three.ledger)
    [asked] = _asked(three, plan, base, tensors)
    whole = perform(replace(asked, data=DataSpec(f"jsonl:{pooled}"), site=str(three.home / "x")))
    assert whole.num_examples == 44
    assert whole.memory
    for name, fisher in whole.memory.items():
        torch.testing.assert_close(memory[name], fisher, rtol=1e-4, atol=1e-9)
        assert torch.equal(
            memory[name.replace("fisher", "anchor")], tensors[name.removeprefix("ewc/fisher/")]
        )


def _asked(workspace, plan, base, tensors):
    from orchestrator.plan import RoundInputs
    from orchestrator.reading import plan_reading
    from strategies.base import Broadcast
    from strategies.fedavg import FedAvg

    trainable = FedAvg().broadcast(FedAvg().init(tensors), None).trainable
    inputs = RoundInputs(3, base, {}, {}, str(workspace.home / "sites"))
    sent = Broadcast(tensors, trainable)
    return plan_reading(plan, inputs, lambda c: sent, plan.participants[:1], "consolidate")


def test_what_a_run_remembers_is_replayed_and_trained_again_to_the_same(home, tiny):
    version = service.launch(home, tiny(**EWC))
    assert [leaf["client"] for leaf in home.store.version(version).recipe["updates"]] == ["a", "b"]
    replayed = service.replay(home, "task-1", whole=True)
    assert [(one.round, one.outcome) for one in replayed] == [(2, "same"), (2, "same"), (1, "same")]
    again = service.retrain(home, "task-1")
    assert (again.versions, again.updates, again.differs) == (4, 6, "")


def test_a_run_starts_from_what_its_clients_made_of_their_data(home, tiny):
    method = {**EWC, "strategy": "ffa-lora", "regularizers": ["first"], "rounds": 1}
    version = service.launch(home, tiny(**method))
    [prepared] = home.store.version(version).parents
    made = home.store.version(prepared.id)
    [start] = made.parents
    assert (made.recipe["kind"], made.recipe["round"], prepared.kind) == ("prepared", 0, "init")
    assert home.store.version(start.id).recipe["kind"] == "start"
    memory, tensors = home.store.memory(prepared.id), home.store.tensors(version)
    assert same(memory, home.store.memory(version))
    factors = [n for n in tensors if n.endswith(".lora_A.weight")]
    assert factors
    for name in factors:  # as prepared, and frozen there
        row = memory["first/" + name.replace(".lora_A.weight", ".sum")]
        assert row.abs().sum() > 0
        assert torch.equal(tensors[name], row.expand_as(tensors[name]))
    replayed = service.replay(home, "task-1", whole=True)
    assert [(one.round, one.outcome) for one in replayed] == [(1, "same"), (0, "same")]
    assert service.retrain(home, "task-1").differs == ""


def test_what_clients_observed_under_dp_spends_nothing_and_is_no_bare_data(home, tiny):
    version = service.launch(home, tiny(**SI, privacy=DP))
    assert len(home.ledger.spends_of_run(home.ledger.run("task-1").id)) == 4  # of two rounds
    found = home.store.version(version)
    assert [leaf["spends"] for leaf in found.recipe["updates"]] == [[], []]
    assert all(leaf["fingerprint"] == "" for leaf in found.recipe["updates"])
    assert not _is_bare(replace(found, recipe={**found.recipe, "private": True}))
    memory = home.store.memory(version)
    assert any(v.sum() > 0 for k, v in memory.items() if k.startswith("si/importance/"))
    assert service.retrain(home, "task-1").differs == ""


# --- in time ----------------------------------------------------------------------------------


def test_a_reading_is_written_down_like_a_round_and_asks_everybody(federation):
    run = federation(**EWC, cohort=2)
    version = run.run()
    at = [e.kind for e in events(run)]
    tail = ["reading", "assigned", *["accepted"] * 4, "closed", "consolidated", "completed"]
    assert at[-len(tail) :] == tail
    [opened], [done] = events(run, "reading"), events(run, "consolidated")
    last = events(run, "committed")[-1]["version"]
    assert (opened["reading"], opened["cohort"], opened["round"]) == ("consolidate", list(FOUR), 3)
    assert done == {"base": last, "version": version}
    assert run._history().asked.keys() <= set(FOUR)
    assert sum(times.rounds for times in run._history().asked.values()) == 4  # two rounds of two
    assert run.store.memory(last) == {}


@pytest.mark.parametrize("regularizer", ["ewc", "first"])
def test_a_run_killed_at_any_event_of_a_reading_ends_at_the_same_version(
    tmp_path, federation, regularizer
):
    settings = {"strategy": "ffa-lora", "rounds": 1, "regularizers": [regularizer]}
    whole = federation("whole", copies=True, **settings)
    wanted = whole.run()
    found = events(whole)
    assert {"reading", "prepared" if regularizer == "first" else "consolidated"} <= {
        e.kind for e in found
    }
    last = next(at for at, e in enumerate(found) if e.kind in ("prepared", "consolidated"))
    died = [at for at in range(1, last + 1) if (tmp_path / f"whole-{at}").exists()]
    assert [found[at].kind for at in died] == [
        "reading",
        "assigned",
        *["accepted"] * 4,
        "closed",
        found[last].kind,
    ]
    for at in died:
        assert federation(f"whole-{at}", **settings).run() == wanted, found[at].kind


def test_in_which_order_clients_read_changes_no_bit(federation, imagined):
    wanted = federation("whole", **EWC).run()
    slow = {(client, 3): 4 - place for place, client in enumerate(FOUR)}
    backend = imagined(delays=slow)
    assert federation("slow", backend, **EWC).run() == wanted
    assert [c for c, r in backend.asked if r == 3] == list(FOUR)


def test_a_reading_makes_do_with_its_quorum_and_fails_below_it(federation, imagined):
    hangs = {("b", 3): 9999}
    run = federation(backend=imagined(delays=hangs), **EWC, quorum=0.75, deadline_s=50)
    version = run.run()
    assert [leaf["client"] for leaf in run.store.version(version).recipe["updates"]] == [*"acd"]
    assert events(run, "closed")[-1]["missed"] == ["b"]

    hangs |= {("c", 3): 9999}
    backend = imagined(delays=hangs)
    below = federation("below", backend, **EWC, quorum=0.75, deadline_s=50)
    with pytest.raises(RoundFailed, match="2 of the 3 updates that it needs"):
        below.run()
    hangs.clear()
    assert federation("below", imagined(), **EWC, quorum=0.75, deadline_s=50).run()


@pytest.mark.parametrize(
    "changes",
    [
        {"late": "keep", "cohort": {"size": 2, "over_provision": 0.5}, "quorum": 2},
        {"asynchronous": {"buffer": 2, "concurrency": 3, "max_staleness": 2}},
        {"select": "best", "evaluate": {"data": "jsonl:/held-back"}},
    ],
    ids=["late", "asynchronous", "best"],
)
def test_who_trains_late_is_not_waited_for_and_everybody_reads(federation, imagined, changes):
    scores = {r: {"accuracy": a} for r, a in enumerate([0.9, 0.5], 1)}
    slow = {("b", 1): 30, ("b", 2): 30}
    run = federation(backend=imagined(slow, scores=scores), **EWC | changes)
    version = run.run()
    [opened] = events(run, "reading")
    assert opened["cohort"] == list(FOUR)
    assert [leaf["client"] for leaf in run.store.version(version).recipe["updates"]] == list(FOUR)
    best = events(run, "committed")[0 if "select" in changes else -1]["version"]
    assert [parent.id for parent in run.store.version(version).parents] == [best]


# --- what comes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: {**m, "ewc/fisher/x": torch.ones(1)}, "ewc/fisher/x is not asked for"),
        (lambda m: dict(list(m.items())[1:]), "is missing"),
        (lambda m: {k: v[:1] for k, v in m.items()}, "expected torch.float32"),
        (lambda m: {k: v.double() for k, v in m.items()}, "is torch.float64"),
        (lambda m: {k: v * torch.nan for k, v in m.items()}, "non-finite values"),
    ],
    ids=["more", "less", "shape", "type", "values"],
)
def test_what_is_not_what_a_reading_asks_for_is_refused(federation, imagined, spoil, reason):
    class Odd(type(imagined())):
        def answer_reading(self, asked, generator):
            made = super().answer_reading(asked, generator)
            return made if asked.client != "b" else replace(made, memory=spoil(made.memory))

    run = federation(backend=Odd(imagined().first), **EWC)
    version = run.run()
    assert [leaf["client"] for leaf in run.store.version(version).recipe["updates"]] == [*"acd"]
    [refused] = events(run, "refused")
    assert refused["client"] == "b"
    assert reason in refused["reason"]


def test_a_reading_takes_no_tensors_and_a_round_no_memory(federation, imagined):
    class Odd(type(imagined())):
        def answer(self, asked):
            made = super().answer(asked)
            if asked.client == "b" and asked.round == 1:
                return replace(made, memory={"ewc/fisher/q": torch.ones(1)})
            return made

        def answer_reading(self, asked, generator):
            made = super().answer_reading(asked, generator)
            return made if asked.client != "c" else replace(made, tensors={"q": torch.ones(1)})

    run = federation(backend=Odd(imagined().first), **EWC)
    run.run()
    assert [(e["client"], e["reason"]) for e in events(run, "refused")] == [
        ("b", "ewc/fisher/q is not asked for"),
        ("c", "q is not asked for"),
    ]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ewc", "mas", "first"])
def test_a_memory_of_data_is_refused_under_privacy(home, tiny, method):
    with pytest.raises(BadConfig, match="computes its memory from data, which is not private"):
        plan_of(tiny(**EWC | {"regularizers": [method]}, privacy=DP), home.store, home.ledger)


def test_a_memory_of_a_clients_own_steps_is_refused_under_client_level_privacy(home, tiny):
    privacy = {"level": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}
    with pytest.raises(BadConfig, match="client-level privacy hides a client in the mean"):
        plan_of(tiny(**SI | {"retention": "none"}, privacy=privacy), home.store, home.ledger)


@pytest.mark.parametrize(
    ("method", "strategy", "reason"),
    [
        ("ewc", "fedsvd", "changes from run to run or round to round what an entry means"),
        ("mas", "rolora", "or which are trained"),
        ("si", "flora", "lays a part of it beneath"),
    ],
)
def test_entries_are_not_held_where_they_mean_something_else(home, tiny, method, strategy, reason):
    config = tiny(**EWC | {"regularizers": [method], "strategy": strategy})
    with pytest.raises(BadConfig, match=reason):
        plan_of(config, home.store, home.ledger)


def test_entries_of_a_new_adapter_are_not_held_near_those_of_an_earlier_one(home, tiny):
    service.launch(home, tiny(name="before", strategy="fedavg"))
    for start in ("stack", "fresh"):
        config = tiny(**SI, start=start, start_from="before")
        with pytest.raises(BadConfig, match=f"start: {start} trains a new adapter"):
            plan_of(config, home.store, home.ledger)
    plan_of(tiny(**SI, start="continue", start_from="before"), home.store, home.ledger)


@pytest.mark.parametrize(
    "strategy", ["ffa-lora", "lora-fair", {"name": "geometric-median", "inner": "fedavg"}]
)
def test_entries_are_held_where_a_round_leaves_them_what_they_are(three, tiny, strategy):
    plan = plan_of(tiny(**EWC | {"strategy": strategy}, quorum=3), three.store, three.ledger)
    assert plan.regularizers[0].name == "ewc"


def test_what_a_robust_rule_chooses_is_no_more_comparable_than_what_is_made_of_it(three, tiny):
    robust = {"name": "geometric-median", "inner": "fedsvd"}
    with pytest.raises(BadConfig, match="changes from run to run or round to round"):
        plan_of(tiny(**EWC | {"strategy": robust}, quorum=3), three.store, three.ledger)


def test_a_start_from_data_is_refused_where_the_strategy_chooses_it(home, tiny):
    with pytest.raises(BadConfig, match="'fedsvd' chooses it too"):
        plan_of(tiny(strategy="fedsvd", regularizers=["first"]), home.store, home.ledger)
