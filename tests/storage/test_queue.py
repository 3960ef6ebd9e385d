"""Claims, leases and fencing tokens, on SQLite and PostgreSQL, between threads and processes."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest

from storage import queue, runs
from storage.ledger import LeaseLost, Ledger, Queueing, UnknownRun


@pytest.fixture
def submit(ledger: Ledger):
    """Return a function that queues a run."""

    def make(id, priority=0, **labels):
        return ledger.create_run(id, "x", {}, {}, 3, Queueing(priority, labels)).id

    return make


@pytest.fixture
def jump(monkeypatch):
    """Return a function that moves the clock of leases by seconds."""
    real = runs.clock

    def by(seconds):
        moved = lambda connection: real(connection) + timedelta(seconds=seconds)  # noqa: E731
        monkeypatch.setattr(queue, "clock", moved)
        monkeypatch.setattr(runs, "clock", moved)

    return by


def claim_all(ledger, limits=None, owner="me:1"):
    found = []
    while (record := ledger.queue.claim(owner, 60, limits)) is not None:
        found.append(record.id)
    return found


def test_the_highest_priority_is_claimed_first_then_the_oldest(ledger, submit):
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)):
        submit(name, priority)
    assert claim_all(ledger) == ["b", "d", "a", "e", "c"]


def test_runs_are_found_by_a_label_oldest_first(ledger, submit):
    for name, labels in (
        ("b", {"sweep": "rates", "gpu": "a100"}),
        ("c", {"sweep": "other"}),
        ("a", {"sweep": "rates"}),
        ("d", {}),
    ):
        submit(name, **labels)
    assert ledger.queue.labelled("sweep", "rates") == ["b", "a"]
    assert ledger.queue.labelled("sweep", "rate") == []
    assert ledger.queue.labels("sweep") == ["other", "rates"]
    assert ledger.queue.labels("stream") == []


def test_a_runs_first_event_says_what_is_written_down_with_it(ledger):
    ledger.create_run("a", "x", {}, {}, queueing=Queueing(facts={"stream": {"name": "desk"}}))
    [event] = ledger.events("a")
    assert (event.kind, event.data) == ("queued", {"stream": {"name": "desk"}})


def test_a_claimed_run_has_an_owner_a_token_and_a_lease(ledger, submit):
    run = submit("a")
    record = ledger.queue.claim("gpu-3:17", 60)
    assert record == ledger.run(run)
    assert (record.status, record.owner, record.token) == ("running", "gpu-3:17", 1)
    assert record.lease_until > record.started_at + timedelta(seconds=50)
    assert ledger.queue.is_driven(run)
    [event] = ledger.events(run, after=1)
    assert (event.kind, event.data) == ("claimed", {"owner": "gpu-3:17", "token": 1})


def test_a_run_may_have_its_owner_from_the_start(ledger):
    run = ledger.create_run("a", "x", {}, {}, 3, Queueing(owner="me:1", lease_s=60)).id
    assert ledger.queue.claim("other:1", 60) is None
    assert (ledger.run(run).owner, ledger.run(run).token) == ("me:1", 1)
    assert [e.kind for e in ledger.events(run)] == ["queued", "claimed"]


def test_a_run_whose_lease_is_over_is_claimed_again_and_its_first_driver_is_fenced(
    ledger, submit, jump
):
    run = submit("a")
    ledger.queue.claim("first:1", 60)
    jump(59)
    assert ledger.queue.claim("second:1", 60) is None
    jump(61)
    assert not ledger.queue.is_driven(run)
    assert ledger.queue.claim("second:1", 60).id == run
    for call in (
        lambda: ledger.record(run, "committed", {}, token=1, round=1),
        lambda: ledger.queue.renew(run, 1, 60),
        lambda: ledger.queue.release(run, 1, "stopped"),
        lambda: ledger.queue.wanted(run, 1),
    ):
        with pytest.raises(LeaseLost, match="second:1 drives it now"):
            call()
    ledger.record(run, "committed", {}, token=2, round=1)
    assert (ledger.run(run).round, ledger.run(run).owner) == (1, "second:1")


def test_a_clock_that_jumps_forward_costs_a_lease_and_never_gives_two_writers(ledger, submit, jump):
    run = submit("a")
    ledger.queue.claim("first:1", 60)
    jump(3600)
    ledger.queue.claim("second:1", 60)
    jump(0)
    with pytest.raises(LeaseLost):
        ledger.record(run, "round", {}, token=1)
    ledger.record(run, "round", {}, token=2)
    assert [e.kind for e in ledger.events(run)] == ["queued", "claimed", "claimed", "round"]


def test_a_clock_that_jumps_back_makes_the_next_driver_wait_and_no_more(ledger, submit, jump):
    run = submit("a")
    jump(3600)
    ledger.queue.claim("first:1", 60)
    jump(0)
    assert ledger.queue.claim("second:1", 60) is None
    ledger.queue.renew(run, 1, 60)  # the lease is as long as it should be again
    jump(61)
    assert ledger.queue.claim("second:1", 60).id == run


def test_a_renewed_lease_lasts(ledger, submit, jump):
    run = submit("a")
    ledger.queue.claim("first:1", 60)
    jump(50)
    ledger.queue.renew(run, 1, 60)
    jump(100)
    assert ledger.queue.claim("second:1", 60) is None
    jump(111)
    assert ledger.queue.claim("second:1", 60).id == run


def test_a_released_run_waits_in_its_old_place_and_keeps_what_people_want(ledger, submit):
    run, _ = submit("a"), submit("b")
    ledger.queue.claim("first:1", 60)
    ledger.record(run, "wanted", {}, wanted="pause")
    ledger.queue.release(run, 1, "stopped")
    record = ledger.run(run)
    assert (record.status, record.owner, record.lease_until) == ("queued", None, None)
    assert record.wanted == "pause"
    with pytest.raises(LeaseLost, match="it is queued"):
        ledger.record(run, "round", {}, token=1)
    assert ledger.queue.claim("second:1", 60).id == run


def test_only_what_waits_is_claimed(ledger, submit):
    for status in ("paused", "completed", "failed", "cancelled"):
        ledger.record(submit(status), status, {}, status=status)
    assert ledger.queue.claim("me:1", 60) is None
    assert ledger.queue.is_idle()
    asked = [ledger.queue.claim("me:1", 60, run=run) for run in ("paused", "failed")]
    assert [(record.id, record.status) for record in asked] == [
        ("paused", "running"),
        ("failed", "running"),
    ]
    assert ledger.queue.claim("me:1", 60, run="completed") is None
    assert ledger.queue.claim("me:1", 60, run="cancelled") is None
    with pytest.raises(UnknownRun):
        ledger.queue.claim("me:1", 60, run="nothing")
    assert not ledger.queue.is_idle()


def test_a_run_that_is_driven_is_nobody_else_s(ledger, submit):
    run = submit("a")
    ledger.queue.claim("first:1", 60)
    assert ledger.queue.claim("second:1", 60, run=run) is None
    assert ledger.run(run).owner == "first:1"


def test_no_more_runs_of_a_label_are_driven_than_its_limit(ledger, submit, jump):
    for name in ("a1", "a2", "a3"):
        submit(name, 9, gpu="a100")
    submit("both", 9, gpu="a100", site="north")
    submit("north", 0, site="north")
    submit("plain", -5)
    limits = {"gpu=a100": 2, "site=north": 1}
    assert claim_all(ledger, limits) == ["a1", "a2", "north", "plain"]
    ledger.record("a1", "completed", {}, status="completed", token=1)
    assert claim_all(ledger, limits) == ["a3"]
    ledger.record("north", "completed", {}, status="completed", token=1)
    assert claim_all(ledger, limits) == []  # `both` has room at north, and none on the a100
    assert ledger.queue.claim("me:1", 60, limits, run="both") is None
    jump(61)  # whose lease is over takes no place either
    assert claim_all(ledger, limits, "you:1") == ["a2", "a3", "plain"]


def test_a_limit_of_none_keeps_a_label_out(ledger, submit):
    submit("a", gpu="a100")
    assert claim_all(ledger, {"gpu=a100": 0}) == []
    assert claim_all(ledger) == ["a"]


CLAIMS = """
import json, sys
from storage.database import open_database
from storage.ledger import Ledger
ledger, owner = Ledger(open_database(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
found = []
while (record := ledger.queue.claim(owner, 60, {"gpu=a100": 3})) is not None:
    found.append(record.id)
print(json.dumps(found))
"""


def test_processes_that_claim_at_once_share_the_queue_without_a_double(ledger, submit, url):
    for number in range(12):
        submit(f"r{number}")
    for number in range(5):
        submit(f"g{number}", gpu="a100")
    commands = [[sys.executable, "-c", CLAIMS, url, f"host:{n}"] for n in range(3)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all stand at the line
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    every = [run for claimed in found for run in claimed]
    assert sorted(every) == sorted({f"r{n}" for n in range(12)} | {"g0", "g1", "g2"})
    owners = {run: f"host:{n}" for n, claimed in enumerate(found) for run in claimed}
    assert {run: ledger.run(run).owner for run in every} == owners
    assert {ledger.run(run).token for run in every} == {1}
