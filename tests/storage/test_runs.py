from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from storage.canonical import NotJson
from storage.ledger import (
    AmbiguousRun,
    BadStatus,
    Event,
    Ledger,
    RunExists,
    UnknownRun,
)

CONFIG = {"model": "tiny", "privacy": {"epsilon": 8.0}}


@pytest.fixture
def run(ledger: Ledger) -> str:
    return ledger.create_run("r-1234", "task-2", CONFIG, {"cohort": ["a", "b"]}, rounds=20).id


def test_a_new_run_is_queued_and_comes_back(ledger, run):
    record = ledger.run(run)
    assert (record.id, record.name, record.status) == ("r-1234", "task-2", "queued")
    assert (record.config, record.plan) == (CONFIG, {"cohort": ["a", "b"]})
    assert (record.version, record.round, record.rounds, record.error) == (None, 0, 20, None)
    assert record.started_at is record.finished_at is None
    assert record.created_at.utcoffset() is not None


def test_an_id_is_used_once(ledger, run):
    with pytest.raises(RunExists, match="id 'r-1234' exists already"):
        ledger.create_run(run, "other", {}, {})
    assert ledger.run(run).name == "task-2"


def test_a_run_goes_on_and_ends(ledger, store, run):
    version = store.commit({"x": torch.ones(1)}, parents={}, recipe={})
    ledger.set_status(run, "running")
    ledger.set_status(run, "running", round=3, version=version)
    halfway = ledger.run(run)
    assert (halfway.status, halfway.round, halfway.rounds) == ("running", 3, 20)
    assert halfway.version == version
    assert halfway.started_at >= halfway.created_at
    assert halfway.finished_at is None
    ledger.set_status(run, "completed", round=20)
    done = ledger.run(run)
    assert (done.status, done.round, done.version) == ("completed", 20, version)
    assert done.started_at == halfway.started_at
    assert done.finished_at >= done.started_at


def test_a_resumed_run_is_neither_finished_nor_failed(ledger, run):
    ledger.set_status(run, "running")
    started = ledger.run(run).started_at
    ledger.set_status(run, "failed", error="3 of 4 clients failed")
    assert ledger.run(run).error == "3 of 4 clients failed"
    assert ledger.run(run).finished_at is not None
    ledger.set_status(run, "running")
    record = ledger.run(run)
    assert (record.error, record.finished_at, record.started_at) == (None, None, started)


def test_a_status_that_is_none_is_refused(ledger, run):
    with pytest.raises(BadStatus, match="queued, running, completed, failed, cancelled; got 'x'"):
        ledger.set_status(run, "x")


def test_a_run_is_found_by_id_prefix_and_name(ledger, run):
    ledger.create_run("r-1999", "task-2", {}, {})
    assert [ledger.run(ref).id for ref in ("r-1234", "r-12")] == ["r-1234", "r-1234"]
    assert ledger.run("task-2").id == "r-1999"
    ledger.create_run("task-2", "named like the others", {}, {})
    assert ledger.run("task-2").name == "named like the others"


def test_a_prefix_of_several_runs_is_refused(ledger, run):
    ledger.create_run("r-1999", "x", {}, {})
    with pytest.raises(AmbiguousRun, match="'r-1' begins r-1999, r-1234; give more of the id"):
        ledger.run("r-1")


@pytest.mark.parametrize("ref", ["", "task-3", "%", "R-12", "r_1234"])
def test_an_unknown_run_is_refused(ledger, run, ref):
    with pytest.raises(UnknownRun, match=f"no run is called '{ref}'"):
        ledger.run(ref)


def test_an_unknown_run_comes_with_the_nearest_name(ledger, run):
    with pytest.raises(UnknownRun, match="did you mean 'task-2'"):
        ledger.run("taks-2")


def test_what_is_not_there_is_not_changed(ledger):
    for call in (
        lambda: ledger.set_status("nothing", "running"),
        lambda: ledger.append("nothing", "started", {}),
        lambda: ledger.events("nothing"),
    ):
        with pytest.raises(UnknownRun, match="no run has the id 'nothing'"):
            call()


def test_runs_are_listed_newest_first_in_pages(ledger):
    for number in range(5):
        ledger.create_run(f"r{number}", "x", {}, {})
    assert [r.id for r in ledger.runs()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [r.id for r in ledger.runs(limit=2, offset=1)] == ["r3", "r2"]


def test_events_count_from_one_and_come_back_in_order(ledger, run):
    other = ledger.create_run("other", "x", {}, {}).id
    assert [ledger.append(run, "round", {"round": n}) for n in range(3)] == [1, 2, 3]
    assert ledger.append(other, "started", {}) == 1
    events = ledger.events(run)
    assert [(e.seq, e.kind, e.data) for e in events] == [
        (1, "round", {"round": 0}),
        (2, "round", {"round": 1}),
        (3, "round", {"round": 2}),
    ]
    assert ledger.events(run, after=2) == events[2:]
    assert isinstance(events[0], Event)


def test_events_that_are_not_json_are_refused(ledger, run):
    with pytest.raises(NotJson, match=r"data\.loss must be a finite number, got nan"):
        ledger.append(run, "round", {"loss": float("nan")})
    assert ledger.events(run) == []


def test_threads_that_append_at_once_lose_nothing_and_leave_no_gap(ledger, run):
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda n: ledger.append(run, "tick", {"n": n}), range(40)))
    assert sorted(given) == list(range(1, 41))
    events = ledger.events(run)
    assert [e.seq for e in events] == list(range(1, 41))
    assert {e.seq: e.data["n"] for e in events} == dict(zip(given, range(40), strict=True))
