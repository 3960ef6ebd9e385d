"""What was made can be made again: from stored updates, and from the data."""

import json
from dataclasses import replace

import pytest
import torch

from clients.wire import pack, unpack
from orchestrator import service
from orchestrator.federation import Federation
from orchestrator.replay import NotReplayable, Replayed
from orchestrator.retraining import NoiseSecret
from orchestrator.upkeep import back_up, fsck, gc, restore
from orchestrator.workspace import open_workspace
from storage.blobs import name_of
from storage.refs import UnknownVersion

LABELS = ("cat", "dog", "model", "rank")
DP = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}


def waiting(home):
    return sorted(home.home.glob("runs/*/round-*/*"))


def outcomes(found):
    return [(one.round, one.outcome) for one in found]


@pytest.mark.parametrize("strategy", ["fedavg", "fedsvd"])
def test_every_version_of_a_run_is_aggregated_again_to_its_id(home, tiny, strategy):
    service.launch(home, tiny(rounds=2, strategy=strategy, retention="all"))
    assert outcomes(service.replay(home, "task-1")) == [(2, "same")]
    assert outcomes(service.replay(home, "task-1", whole=True)) == [(2, "same"), (1, "same")]


def test_the_end_of_a_task_is_reached_with_its_memory(home, tiny, notes):
    config = tiny(
        strategy="fedsvd",
        retention="all",
        rounds=2,
        regularizers=[{"name": "o-lora", "form": "hard"}],
    )
    service.launch(home, config)
    assert outcomes(service.replay(home, "task-1")) == [(2, "same")]

    best = config.model_copy(update={"name": "best"}).model_dump(mode="json")
    chosen = {"select": "best", "evaluate": {"data": notes("test", shift=5)}}
    document = {**best, **chosen, "regularizers": [{"name": "o-lora", "form": "hard"}]}
    for kind in ("adapter", "strategy", "optimizer"):
        document[kind] = {"name": document[kind]["name"], **document[kind]["options"]}
    service.launch(home, tiny(**document))
    assert home.store.version("best").recipe["kind"] == "final"
    assert {o for _, o in outcomes(service.replay(home, "best", whole=True))} == {"same"}


BUFFERED = {
    "strategy": "ffa-lora",
    "rounds": 3,
    "asynchronous": {"buffer": 2, "concurrency": 3, "max_staleness": 2},
}


def stale_run(workspace, plan, backend):
    """Drive an asynchronous run of imagined clients and return its version."""
    config = plan.config.model_dump(mode="json")
    workspace.ledger.create_run("run-1", "task-1", config, plan.to_json())
    return Federation(plan, workspace.store, workspace.ledger, backend, workspace.home).run()


@pytest.mark.parametrize(("retention", "rounds"), [("all", {1, 2, 3}), ({"last": 1}, {3})])
def test_stale_updates_are_aggregated_again_as_they_were(
    workspace, make_plan, imagined, retention, rounds
):
    plan = make_plan(clients=("a", "b", "c", "d"), **BUFFERED, retention=retention)
    slow = {(client, r): 1 + ord(client) % 3 for client in "abcd" for r in range(1, 5)}
    version = stale_run(workspace, plan, imagined(slow))

    history = workspace.store.lineage(version).nodes.values()
    assert [leaf for v in history for leaf in v.recipe["updates"] if leaf["weight"] < 1]
    same = {
        one.round for one in service.replay(workspace, version, whole=True) if one.outcome == "same"
    }
    assert rounds <= same


def test_an_altered_update_is_not_taken_for_the_one_in_the_lineage(home, tiny, kept):
    service.launch(home, tiny(retention="all"))
    sha256 = kept(home)[1, "b"]
    update = unpack(home.blobs.fetch(sha256))
    name = next(iter(update.tensors))
    tensors = {**update.tensors, name: update.tensors[name] + 1}
    home.blobs.place.write(name_of(sha256), pack(replace(update, tensors=tensors)))

    [found] = service.replay(home, "task-1")
    assert found.outcome == "gone"
    assert f"of b in round 1 cannot be read: blob {sha256[:12]} is corrupt" in found.why
    [problem] = fsck(home).store.problems
    assert (problem.kind, problem.subject) == ("blob-corrupt", sha256)


def test_a_version_is_aggregated_again_where_only_database_and_blobs_are(home, tiny, tmp_path):
    service.launch(home, tiny(rounds=2, retention="all"))
    assert waiting(home) == []
    there = open_workspace(tmp_path / "there", str(home.engine.url), home.blobs.place.where())
    assert outcomes(service.replay(there, "task-1", whole=True)) == [(2, "same"), (1, "same")]
    there.close()


def test_kept_updates_are_in_a_backup_and_come_back(home, tiny, tmp_path):
    service.launch(home, tiny(retention="all"))
    assert back_up(home, tmp_path / "backup").missing == ()
    there = open_workspace(tmp_path / "there")
    _, _, found = restore(there, tmp_path / "backup")
    assert found.store.is_sound
    assert outcomes(service.replay(there, "task-1")) == [(1, "same")]
    there.close()


def test_an_aggregate_that_is_another_is_found(home, tiny, monkeypatch):
    service.launch(home, tiny(retention="all"))
    from strategies.fedavg import FedAvg

    honest = FedAvg.aggregate

    def tampered(self, state, given):
        after = honest(self, state, given)
        moved = {n: t + torch.tensor(1e-7) if t.dim() else t for n, t in after.adapter.items()}
        return type(after)(moved, after.auxiliary)

    monkeypatch.setattr(FedAvg, "aggregate", tampered)
    [found] = service.replay(home, "task-1")
    assert (found.outcome, found.why) == ("differs", "the same updates give other bytes")
    assert service.retrain(home, "task-1").differs == (
        "round 1: the same updates aggregate to another version"
    )


def test_what_is_not_made_of_updates_is_refused(home, tiny):
    version = service.launch(home, tiny())
    start = home.store.version(version).parents[0].id
    with pytest.raises(NotReplayable, match="is of kind 'start', which is not made of client"):
        service.replay(home, start)
    assert service.replay(home, start, whole=True) == []
    with pytest.raises(UnknownVersion):
        service.replay(home, "nothing")


# --- retention --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "rounds"),
    [
        (None, set()),
        ("until-closed", set()),
        ("none", set()),
        ("all", {1, 2, 3}),
        ({"last": 2}, {2, 3}),
        ({"last": 9}, {1, 2, 3}),
    ],
)
def test_updates_are_kept_as_the_run_says(home, tiny, retention, rounds, kept):
    changes = {} if retention is None else {"retention": retention}
    service.launch(home, tiny(rounds=3, steps=1, **changes))

    assert set(kept(home)) == {(n, client) for n in rounds for client in "ab"}
    assert waiting(home) == []
    wanted = {1: "same", 0: "gone"}
    found = outcomes(service.replay(home, "task-1", whole=True))
    assert found == [(n, wanted[n in rounds]) for n in (3, 2, 1)]
    assert fsck(home).store.orphans == ()
    assert gc(home, delete=True, grace_s=0)[0].removed == ()


def test_retention_changes_no_id(home, tiny):
    ids = {service.launch(home, tiny(retention=one)) for one in ("all", "none", {"last": 1})}
    assert len(ids) == 1


def test_what_one_run_keeps_is_not_dropped_with_another_that_made_the_same(home, tiny, kept):
    service.launch(home, tiny(retention="all"))
    before = kept(home)
    service.launch(home, tiny(name="again"))
    assert kept(home) == before
    assert outcomes(service.replay(home, "again")) == [(1, "same")]


def test_updates_are_there_until_a_run_is_closed(home, tiny, kept):
    seen = {}

    def observe(kind, data):
        seen.setdefault(kind, []).append(len(kept(home)))

    service.launch(home, tiny(rounds=2), observe)
    assert seen["committed"] == [2, 4]
    assert seen["completed"] == [0]


def test_a_run_keeps_its_updates_while_it_can_go_on_and_not_when_it_is_cancelled(home, tiny, kept):
    def observe(kind, data):
        if kind == "committed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.launch(home, tiny(rounds=2), observe)
    run = home.ledger.runs()[0].id
    service.requeue(home, run)
    assert len(kept(home)) == 2

    service.cancel(home, run)
    assert (kept(home), waiting(home)) == ({}, [])


def test_a_run_that_is_cancelled_while_it_is_driven_keeps_no_updates(home, tiny, kept):
    def observe(kind, data):
        if kind == "committed":
            service.cancel(home, home.ledger.runs()[0].id)

    with pytest.raises(RuntimeError, match="is cancelled"):
        service.launch(home, tiny(rounds=2), observe)
    assert home.ledger.runs()[0].status == "cancelled"
    assert (kept(home), waiting(home)) == ({}, [])


@pytest.mark.parametrize("value", ["some", {"last": 0}, {"last": "many"}, {"keep": "last"}, 3])
def test_a_retention_that_is_none_is_refused(tiny, value):
    with pytest.raises(ValueError, match="retention"):
        tiny(retention=value)


# --- from data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 2, "strategy": "fedsvd"},
        {"privacy": DP},
        {"head": "personal", "rounds": 2},
    ],
    ids=["two rounds", "insecure DP", "personal heads"],
)
def test_a_run_is_trained_again_to_the_same_versions(home, tiny, changes):
    service.launch(home, tiny(**changes))
    before = {path: path.stat().st_mtime_ns for path in home.home.rglob("*") if path.is_file()}
    found = service.retrain(home, "task-1")

    rounds = changes.get("rounds", 1)
    assert (found.versions, found.updates, found.differs) == (rounds + 1, 2 * rounds, "")
    kept = {p: t for p, t in before.items() if "weft.db" not in p.name}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_data_that_changed_are_found_where_they_were_used(home, tiny, notes):
    service.launch(home, tiny(rounds=2))
    notes("b", size=12, shift=5)
    found = service.retrain(home, "task-1")
    assert (found.versions, found.updates) == (1, 1)
    assert found.differs == (
        "round 1, b: its data are not those that it was trained on (another fingerprint)"
    )


def test_a_run_whose_noise_is_secret_is_not_trained_again(home, tiny):
    service.launch(home, tiny(privacy={"noise_multiplier": 1.0, "delta": 1e-3}))
    with pytest.raises(NoiseSecret, match="its noise is keyed by secrets that stay at its clients"):
        service.retrain(home, "task-1")


# --- the command line -------------------------------------------------------------------------


def test_the_commands_replay_a_version_and_a_run(ok, read, refused, weft, run_yaml, tmp_path):
    ok("run", run_yaml(retention={"last": 1}))
    assert "round 2  same" in ok("replay", "task-1", "--verify")
    [one] = read("replay", "task-1", "--verify")
    assert one.keys() == Replayed.__dataclass_fields__.keys()
    code, said, error = weft("replay", "task-1", "--verify", "--all")
    assert (code, "round 1  gone  the update " in said) == (2, True)
    assert "not every version of task-1 was reached again" in error

    assert "4 updates and 3 versions are the same" in ok("replay", "task-1", "--from-data")
    data = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n".join(json.dumps({**row, "text": row["text"] + " x"}) for row in rows))
    code, said, error = weft("replay", "task-1", "--from-data", "--json")
    assert (code, json.loads(said)["updates"]) == (2, 0)
    assert "it differs first at round 1, w0: its data are not those" in error
    assert "give --verify for a version" in refused("replay", "task-1")


def test_encoded_updates_are_aggregated_and_trained_again_to_the_same(home, tiny, kept):
    """With feedback, so that round 2 sends what round 1 left out; under a robust rule."""
    config = tiny(
        rounds=2,
        strategy={"name": "norm-clip", "inner": "ffa-lora"},
        uplink=[{"name": "top-k", "density": 0.2}, "int8"],
        labels=[*LABELS, "other"],
        task_labels=list(LABELS),
        retention="all",
    )
    service.launch(home, config)
    assert outcomes(service.replay(home, "task-1", whole=True)) == [(2, "same"), (1, "same")]
    again = service.retrain(home, "task-1")
    assert (again.versions, again.updates, again.differs) == (3, 4, "")
    version = home.store.version("task-1")
    assert [stage["name"] for stage in version.recipe["uplink"]] == ["top-k", "int8"]
    stored = [home.store.updates.read(digest) for digest in kept(home).values()]
    sent = unpack(stored[0]).tensors
    assert {t.dtype for t in sent.values()} == {torch.int8, torch.int32, torch.float32}
    run = home.ledger.runs()[0].id
    events = [e.data for e in home.ledger.events(run) if e.kind == "accepted"]
    told = sorted(e["bytes"] for e in events)
    assert told == sorted(len(data) for data in stored)
