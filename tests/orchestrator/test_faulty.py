"""What a run does about faults: refuses, goes on, or stops with a sentence and is resumed."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.faults import FaultAt, Faults
from orchestrator.faulty import FaultyBackend, Host
from storage.blobs import BlobCorrupt
from storage.database import DatabaseUnavailable
from strategies.base import Update


@pytest.fixture
def simulated(tiny, notes):
    """Return a function that makes a config of three simulated clients in two rounds."""
    data = notes(size=24)

    def make(**changes):
        clients = {"simulate": {"data": data, "by": "iid", "parts": 3, "public": True}}
        return tiny(**({"clients": clients, "rounds": 2} | changes))

    return make


def client_names(workspace):
    [record] = workspace.ledger.runs()
    return [p["name"] for p in workspace.ledger.plan(record.id)["participants"]]


def events(workspace, kind):
    [record] = workspace.ledger.runs()
    return [e.data for e in workspace.ledger.events(record.id) if e.kind == kind]


@pytest.fixture
def honest(simulated, tmp_path):
    """The version of a run without faults, and its clients."""
    workspace = service.open_workspace(tmp_path / "honest")
    return service.launch(workspace, simulated()), client_names(workspace)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nan", "1 non-finite values"),
        ("wrong-shape", "expected torch.float32"),
        ("replay", "the update is of round 1 from "),
    ],
)
def test_a_client_with_a_fault_is_refused_with_the_reason_and_the_round_goes_on(
    workspace, simulated, honest, kind, why
):
    wanted, (first, *others) = honest
    fault = [{"kind": kind, "client": first, "round": 2}]
    version = service.launch(workspace, simulated(faults=fault, retries=0))

    [refused] = events(workspace, "refused")
    assert (refused["client"], refused["round"]) == (first, 2)
    assert why in refused["reason"]
    assert events(workspace, "closed")[1]["missed"] == []
    assert version != wanted
    updates = workspace.store.version(version).recipe["updates"]
    assert [leaf["client"] for leaf in updates] == others


def test_whose_update_is_lost_misses_the_round(workspace, simulated, honest):
    _, (first, *others) = honest
    fault = [{"kind": "drop", "client": first, "round": 2}]
    version = service.launch(workspace, simulated(faults=fault, deadline_s=3))

    assert events(workspace, "closed")[1]["missed"] == [first]
    updates = workspace.store.version(version).recipe["updates"]
    assert [leaf["client"] for leaf in updates] == others


@pytest.mark.parametrize("kind", ["retried", "refused"])
def test_who_sends_an_earlier_update_is_asked_again_then_refused_and_so_after_a_crash(
    tmp_path, simulated, honest, kind
):
    _, (first, *_) = honest
    config = simulated(faults=[{"kind": "replay", "client": first, "round": 2}])
    whole, killed = (service.open_workspace(tmp_path / name) for name in ("whole", "killed"))
    wanted = service.launch(whole, config)
    [retried], [refused] = events(whole, "retried"), events(whole, "refused")
    assert retried == {k: v for k, v in refused.items() if k != "fault"}
    assert "the update is of round 1 from " in retried["reason"]

    def die(happened, data):
        if happened == kind:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.launch(killed, config, die)
    assert service.resume(killed, "task-1") == wanted
    assert [r["client"] for r in events(killed, "refused")] == [first]


@pytest.mark.parametrize("kind", ["slow", "duplicate"])
def test_a_fault_that_costs_no_update_changes_no_byte(workspace, simulated, honest, kind):
    wanted, clients = honest
    faults = {"kinds": [kind], "clients": 1.0, "delay_s": 0.01}
    assert service.launch(workspace, simulated(faults=faults)) == wanted
    assert len(events(workspace, "accepted")) == 2 * len(clients)
    again = events(workspace, "duplicate")  # the last of a round is not waited for
    assert len(again) == (2 * (len(clients) - 1) if kind == "duplicate" else 0)
    assert all("came again, and the first counts" in one["reason"] for one in again)


@pytest.mark.parametrize("faults", [None, {"kinds": ["slow"], "clients": 1.0, "delay_s": 0.01}])
def test_clients_with_and_without_faults_keep_the_checkpoints_that_are_asked_for(
    workspace, simulated, faults
):
    kept = set()

    def observe(kind, data):
        if kind == "step":
            kept.update(workspace.home.glob("sites/**/checkpoint-*"))

    backend = {"name": "inline", "checkpoint_s": 0}
    service.launch(workspace, simulated(backend=backend, faults=faults, rounds=1), observe)
    assert len(kept) == 3


def test_two_faults_that_cost_the_same_update_end_at_the_same_version(tmp_path, simulated, honest):
    """What went wrong is no part of a version: who was accepted is."""
    _, (first, *_) = honest
    ids = set()
    for kind in ("nan", "wrong-shape", "replay"):
        workspace = service.open_workspace(tmp_path / kind)
        fault = [{"kind": kind, "client": first, "round": 1}]
        ids.add(service.launch(workspace, simulated(faults=fault)))
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("kind", "error", "why"),
    [
        ("full-disk", OSError, "No space left on device: '.*/blobs/"),
        ("database-outage", DatabaseUnavailable, "the database outage that faults ask for"),
    ],
)
def test_a_coordinator_in_trouble_stops_with_a_sentence_and_resumes_to_the_same_version(
    workspace, simulated, honest, kind, error, why
):
    wanted, _ = honest
    with pytest.raises(error, match=why):
        service.launch(workspace, simulated(faults=[{"kind": kind, "round": 2}]))
    [record] = workspace.ledger.runs()
    assert record.status == "failed"
    assert service.resume(workspace, record.id) == wanted


def test_a_blob_that_changes_on_the_disk_is_found_when_it_is_read(workspace, simulated, honest):
    wanted, _ = honest
    config = simulated(faults=[{"kind": "corrupt-blob", "round": 2}])
    assert service.launch(workspace, config) == wanted
    with pytest.raises(BlobCorrupt, match="get it from a backup with weft fsck"):
        workspace.store.tensors(wanted)


def test_a_clock_that_jumps_moves_times_and_no_byte(workspace, simulated, honest):
    wanted, _ = honest
    config = simulated(faults=[{"kind": "clock-jump", "round": 2}])
    assert service.launch(workspace, config) == wanted
    [record] = workspace.ledger.runs()
    times = [e.at for e in workspace.ledger.events(record.id)]
    steps = [abs((b - a).total_seconds()) for a, b in itertools.pairwise(times)]
    assert sum(step > 3000 for step in steps) == 1


def test_a_fault_of_a_client_that_is_not_there_is_refused(workspace, simulated):
    with pytest.raises(BadConfig, match="faults: no client is called 'nobody'"):
        service.launch(
            workspace, simulated(faults=[{"kind": "nan", "client": "nobody", "round": 1}])
        )
    assert workspace.ledger.runs() == []


def test_what_is_asked_for_is_shown_before_it_happens(workspace, simulated, honest):
    _, (first, *_) = honest
    seen = []
    fault = [{"kind": "nan", "client": first, "round": 1}]
    service.launch(workspace, simulated(faults=fault), lambda kind, data: seen.append((kind, data)))
    assert [data for kind, data in seen if kind == "fault"] == [
        {"round": 1, "client": first, "kind": "nan"}
    ]


class Answering:
    """A backend that answers each assignment with the update it is given for it."""

    def __init__(self, answers):
        self.answers = answers

    def run(self, assignments, started, stepped):
        for assignment in assignments:
            yield self.answers[assignment.round]

    def close(self):
        pass


def test_a_replayed_update_is_the_one_of_the_round_before_however_often_it_is_asked_for(tmp_path):
    faults = Faults(at=(FaultAt(kind="replay", client="c", round=2),))
    answers = {r: Update("c", r, f"base-{r}", {"x": torch.ones(1) * r}, 1) for r in (1, 2)}
    backend = FaultyBackend(
        Answering(answers), faults, Host(faults, tmp_path, lambda k, d: None), lambda k, d: None
    )

    # the assignments of two rounds, of which a backend needs no more than this
    asked = [SimpleNamespace(action="train", round=r, client="c") for r in (1, 2, 2)]
    rounds = [list(backend.run([a], lambda a: None)) for a in asked]
    assert [[(u.round, u.base) for u in round_] for round_ in rounds] == [[(1, "base-1")]] * 3


@pytest.mark.parametrize("kind", ["replay", "drop", "duplicate"])
def test_an_initialisation_is_no_client_s_and_arrives_once_whoever_is_faulty(tmp_path, kind):
    faults = Faults(kinds=(kind,), clients=1.0)
    first = Update("", 0, "", {"x": torch.ones(1)}, 0)
    backend = FaultyBackend(
        Answering({0: first}),
        faults,
        Host(faults, tmp_path, lambda k, d: None),
        lambda k, d: None,
    )

    asked = SimpleNamespace(action="init", round=0, client="")
    results = backend.run([asked], lambda a: None)
    assert next(results) is first
    assert next(results, None) is None
