import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from storage.canonical import NotJson, RecordCorrupt
from storage.database import open_database, writing
from storage.ledger import (
    AmbiguousRun,
    BadLabels,
    BadStatus,
    LeaseLost,
    Ledger,
    Queueing,
    RunChanged,
    RunExists,
    UnknownRun,
)
from storage.projection import PROJECTED, project
from storage.records import STATUSES, WISHES
from storage.schema import runs

CONFIG = {"model": "tiny", "privacy": {"epsilon": 8.0}}


@pytest.fixture
def run(ledger: Ledger) -> str:
    return ledger.create_run("r-1234", "task-2", CONFIG, {"cohort": ["a", "b"]}, rounds=20).id


def test_a_new_run_is_queued_and_comes_back(ledger, run):
    record = ledger.run(run)
    assert (record.id, record.name, record.status) == ("r-1234", "task-2", "queued")
    assert (record.config, ledger.plan(run)) == (CONFIG, {"cohort": ["a", "b"]})
    assert (record.version, record.round, record.rounds, record.error) == (None, 0, 20, None)
    assert record.started_at is record.finished_at is None
    assert record.created_at.utcoffset() is not None


def test_an_event_costs_the_same_however_long_the_plan_is(ledger, engine):
    plan = {"participants": [f"node-{n:05}" for n in range(1000)]}
    ledger.create_run("long", "x", {}, plan)
    with engine.connect() as connection:
        row = connection.execute(select(runs).where(runs.c.id == "long")).one()
    assert len(str(row)) < 1000
    assert ledger.plan("long") == plan


def test_an_id_is_used_once(ledger, run):
    with pytest.raises(RunExists, match="id 'r-1234' exists already"):
        ledger.create_run(run, "other", {}, {})
    assert ledger.run(run).name == "task-2"


def test_a_run_goes_on_and_ends(ledger, store, run):
    version = store.commit({"x": torch.ones(1)}, parents={}, recipe={})
    ledger.record(run, "claimed", {}, status="running")
    ledger.record(run, "committed", {}, round=3, version=version)
    halfway = ledger.run(run)
    assert (halfway.status, halfway.round, halfway.rounds) == ("running", 3, 20)
    assert halfway.version == version
    assert halfway.started_at >= halfway.created_at
    assert halfway.finished_at is None
    ledger.record(run, "completed", {}, status="completed", round=20)
    done = ledger.run(run)
    assert (done.status, done.round, done.version) == ("completed", 20, version)
    assert done.started_at == halfway.started_at
    assert done.finished_at >= done.started_at


def test_a_resumed_run_is_neither_finished_nor_failed(ledger, run):
    ledger.record(run, "claimed", {}, status="running")
    started = ledger.run(run).started_at
    ledger.record(run, "failed", {}, status="failed", error="3 of 4 clients failed")
    assert ledger.run(run).error == "3 of 4 clients failed"
    assert ledger.run(run).finished_at is not None
    ledger.record(run, "claimed", {}, status="running")
    record = ledger.run(run)
    assert (record.error, record.finished_at, record.started_at) == (None, None, started)


def test_a_status_that_is_none_is_refused(ledger, run):
    wanted = "status is one of queued, running, paused, completed, failed, cancelled; got 'x'"
    with pytest.raises(BadStatus, match=wanted):
        ledger.record(run, "odd", {}, status="x")
    with pytest.raises(BadStatus, match="wanted is one of run, pause, cancel; got 'y'"):
        ledger.record(run, "odd", {}, wanted="y")
    assert [e.kind for e in ledger.events(run)] == ["queued"]


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
        lambda: ledger.record("nothing", "started", {}),
        lambda: ledger.events("nothing"),
        lambda: ledger.plan("nothing"),
        lambda: ledger.runs(before="nothing"),
    ):
        with pytest.raises(UnknownRun, match="no run has the id 'nothing'"):
            call()


def test_runs_are_listed_newest_first_in_pages(ledger):
    for number in range(5):
        ledger.create_run(f"r{number}", "x", {}, {})
    assert [r.id for r in ledger.runs()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [r.id for r in ledger.runs(limit=2, before="r4")] == ["r3", "r2"]
    ledger.record("r1", "paused", {}, status="paused")
    assert [r.id for r in ledger.runs(status="paused")] == ["r1"]
    assert [r.id for r in ledger.runs(limit=2, before="r3", status="queued")] == ["r2", "r0"]


def test_events_count_from_one_and_come_back_in_order(ledger, run):
    other = ledger.create_run("other", "x", {}, {}).id
    assert [ledger.record(run, "round", {"round": n}) for n in range(3)] == [2, 3, 4]
    assert ledger.record(other, "started", {}) == 2
    events = ledger.events(run)
    assert [(e.seq, e.kind, e.data) for e in events] == [
        (1, "queued", {}),
        (2, "round", {"round": 0}),
        (3, "round", {"round": 1}),
        (4, "round", {"round": 2}),
    ]
    assert ledger.events(run, after=3) == events[3:]
    assert ledger.events(run, after=1, limit=2) == events[1:3]
    assert ledger.events(run, limit=2, kinds={"round", "committed"}) == events[1:3]
    assert ledger.events(run, kinds=()) == []
    assert ledger.run(run).seq == 4


def test_events_that_are_not_json_are_refused(ledger, run):
    with pytest.raises(NotJson, match=r"data\.loss must be a finite number, got nan"):
        ledger.record(run, "round", {"loss": float("nan")}, status="running")
    assert [e.kind for e in ledger.events(run)] == ["queued"]
    assert ledger.run(run).status == "queued"


def test_an_event_whose_change_cannot_be_stored_is_not_written_either(ledger, run):
    with pytest.raises(IntegrityError):
        ledger.record(run, "committed", {}, version="of nothing", round=1)
    record = ledger.run(run)
    assert (record.round, record.seq) == (0, 1)
    assert [e.kind for e in ledger.events(run)] == ["queued"]


def test_threads_that_record_at_once_lose_nothing_and_leave_no_gap(ledger, run):
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda n: ledger.record(run, "tick", {"n": n}), range(40)))
    assert sorted(given) == list(range(2, 42))
    events = ledger.events(run)[1:]
    assert [e.seq for e in events] == list(range(2, 42))
    assert {e.seq: e.data["n"] for e in events} == dict(zip(given, range(40), strict=True))


def test_labels_that_no_index_can_hold_are_refused(ledger):
    with pytest.raises(BadLabels, match="may have 1000 characters in all, got 1"):
        ledger.create_run("r", "x", {}, {}, queueing=Queueing(labels={"gpu": "x" * 1000}))


# --- who may write ----------------------------------------------------------------------------


def test_who_has_an_old_token_writes_nothing(ledger, run):
    ledger.queue.claim("first:1", 60)
    token = ledger.run(run).token
    ledger.record(run, "round", {}, token=token)
    ledger.record(run, "paused", {}, status="paused")  # by hand: takes it away from its driver
    with pytest.raises(LeaseLost, match=f"has the token {token + 1}, and this driver's is {token}"):
        ledger.record(run, "committed", {}, token=token, round=1, status="running")
    record = ledger.run(run)
    assert (record.status, record.round, record.owner) == ("paused", 0, None)
    assert [e.kind for e in ledger.events(run)] == ["queued", "claimed", "round", "paused"]


def test_a_decision_on_an_old_look_is_refused(ledger, run):
    seen = ledger.run(run).seq
    ledger.queue.claim("first:1", 60)
    with pytest.raises(RunChanged, match="has event 2 by now, not 1"):
        ledger.record(run, "paused", {}, status="paused", after=seen)
    assert ledger.run(run).status == "running"
    ledger.record(run, "wanted", {}, wanted="pause", after=seen + 1)
    assert ledger.queue.wanted(run, ledger.run(run).token) == "pause"


# --- the row is the projection of the events --------------------------------------------------

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(STATUSES),
        "round": st.integers(0, 9),
        "rounds": st.integers(0, 9),
        "error": st.none() | st.just("out of memory"),
        "wanted": st.sampled_from(WISHES),
    },
)
STEPS = st.lists(st.tuples(st.sampled_from(["record", "claim", "release"]), FIELDS), max_size=8)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=STEPS,
    priority=st.integers(-3, 3),
    labels=st.dictionaries(st.text("ab", min_size=1), st.text("ab")),
)
def test_a_run_s_row_is_what_its_events_amount_to(ledger, steps, priority, labels):
    run = ledger.create_run(secrets.token_hex(4), "x", {}, {}, 5, Queueing(priority, labels)).id
    for step, fields in steps:
        if step == "record":
            ledger.record(run, "something", {}, **fields)
        elif step == "claim":
            ledger.queue.claim("somebody:1", 60, run=run)
        elif ledger.run(run).status == "running":
            ledger.queue.release(run, ledger.run(run).token, "stopped")
    record, events = ledger.run(run), ledger.events(run)
    assert {name: getattr(record, name) for name in PROJECTED} == project(events)
    assert record.seq == len(events)
    assert (record.owner is None) or record.status == "running"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE runs SET config = '{'", "record of run r is damaged"),
        ("UPDATE runs SET labels = '[]'", "record of run r is damaged"),
        ("UPDATE events SET data = 'null'", "record of event 1 of run r is damaged"),
        ("UPDATE plans SET plan = '[[[['", "record of the plan of run r is damaged"),
    ],
)
def test_a_record_that_was_changed_from_outside_is_refused(ledger, engine, statement, message):
    ledger.create_run("r", "task-1", config=CONFIG, plan={})
    with writing(engine) as connection:
        connection.execute(text(statement))
    with pytest.raises(RecordCorrupt, match=f"{message}.*restore the database from a backup"):
        (ledger.run("r"), ledger.plan("r"), ledger.events("r"))


def test_a_time_that_was_changed_from_outside_is_refused(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path}/weft.db")
    ledger = Ledger(engine)
    ledger.create_run("r", "task-1", config=CONFIG, plan={})
    with writing(engine) as connection:
        connection.execute(text("UPDATE runs SET created_at = '2O26-11-22 07:52:14.021077'"))
    with pytest.raises(RecordCorrupt, match=r"the time '2O26-.*is damaged"):
        ledger.runs()
    engine.dispose()
