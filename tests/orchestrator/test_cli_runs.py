"""Queued runs from the command line: what each command prints, and how it refuses."""

import json
import signal

import pytest

from orchestrator import progress
from orchestrator.workspace import open_workspace


@pytest.fixture
def ledger(ok, tmp_path):
    """Return the ledger of the home that the commands use."""
    return open_workspace(tmp_path / "home").ledger


@pytest.fixture
def queued(ok, run_yaml):
    """Return the id of a run of one round that waits."""
    return ok("run", run_yaml(rounds=1), "--detach").strip()


def test_what_clients_tell_in_noise_is_shown(ok, read, run_yaml):
    privacy = {"noise_multiplier": 2.0, "delta": 1e-3, "report": {"loss": 4.0}}

    said = ok("run", run_yaml(privacy=privacy))

    assert "hidden by DP" not in said
    told = read("runs", "show", "task-1")["train_loss"]
    assert list(told) == ["1", "2"]
    assert all(0 <= loss <= 4 for loss in told.values())
    shown = ", ".join(f"{loss:.3f}" for loss in told.values())
    assert f"train_loss of the last rounds: {shown}\n" in ok("runs", "show", "task-1")


def test_a_whole_life_of_a_queued_run(ok, weft, read, run_yaml, tmp_path):
    code, out, err = weft("run", run_yaml(), "--detach", "--priority", 3, "--label", "gpu=a100")
    run = out.strip()
    assert (code, out, err) == (0, f"{run}\n", "queued; a weft coordinator drives it\n")
    record = read("runs", "show", run)
    assert (record["status"], record["priority"], record["labels"]) == (
        "queued",
        3,
        {"gpu": "a100"},
    )

    assert ok("runs", "pause", run) == f"{run}: paused, 0 of 2 rounds\n"
    assert ok("coordinator", "--until-idle") == "drove 0 runs\n"
    assert ok("runs", "resume", run) == f"{run}: queued, 0 of 2 rounds\n"
    said = ok("coordinator", "--once", "--limit", "gpu=a100:1")
    assert said.startswith(f"run {run} of task-1\n")
    assert "round 2/2: 2 updates, loss " in said
    assert said.endswith("drove 1 runs\n")

    record = read("runs", "show", run)
    assert (record["status"], record["round"], record["owner"]) == ("completed", 2, None)
    assert ok("runs", "wait", run) == f"{run} completed {record['version']}\n"
    log = [json.loads(line) for line in ok("runs", "log", run, "--follow", "--json").splitlines()]
    kinds = [event["kind"] for event in log]
    assert kinds[:4] == ["queued", "paused", "queued", "claimed"]
    assert kinds[-1] == "completed"
    assert log[-1]["changes"] == {"status": "completed", "version": record["version"]}

    extended = ok("runs", "extend", run, "--rounds", "+1")
    assert extended == f"{run}: queued, 2 of 3 rounds\n"
    assert "round 3/3" in ok("run", "--resume", run)
    assert read("runs", "show", run)["round"] == 3

    clone = ok("runs", "clone", run, "--set", "rounds=1", "--detach").strip()
    record = read("runs", "show", clone)
    assert (record["rounds"], record["priority"], record["labels"]) == (1, 3, {"gpu": "a100"})
    cancelled = read("runs", "cancel", clone)
    assert (cancelled["id"], cancelled["status"]) == (clone, "cancelled")
    assert "task-1:v3" in ok("runs", "clone", run, "--set", "seed=5", "--priority", 0)


def test_the_list_shows_who_drives_what_and_pages(ok, read, ledger, queued, run_yaml):
    second = ok("run", run_yaml(), "--detach", "--priority", -2).strip()
    ledger.queue.claim("gpu-3:4711:abc:1", 60)
    ledger.record(queued, "wanted", {}, wanted="pause")

    table = ok("runs")
    header, first, other = (
        line for line in table.splitlines() if "task-1" in line or "age" in line
    )
    assert [word in header for word in ("status", "priority", "owner", "round", "age")] == [
        True
    ] * 5
    assert second in first
    assert [word in first for word in ("queued", " -2 ", "0/2")] == [True] * 3
    assert [word in other for word in ("running (to be paused)", "gpu-3:4711 ")] == [True] * 2
    assert [r["id"] for r in read("runs", "list", "--status", "queued")] == [second]
    assert f"older ones: --before {second}" in ok("runs", "list", "--limit", 1)
    assert [r["id"] for r in read("runs", "list", "--before", second)] == [queued]


def test_waiting_tells_by_its_exit_code_how_runs_ended(weft, ledger, queued, run_yaml, ok):
    other = ok("run", run_yaml(rounds=1), "--detach").strip()
    ledger.record(queued, "completed", {}, status="completed")
    ledger.record(other, "failed", {}, status="failed", error="out of memory")
    assert weft("runs", "wait", queued)[0] == 0
    code, out, _ = weft("runs", "wait", queued, other)
    assert (code, out.splitlines()[1]) == (1, f"{other} failed out of memory")
    code, out, _ = weft("runs", "wait", other, "--json")
    assert (code, json.loads(out)[0]["status"]) == (1, "failed")


def test_waiting_no_longer_than_asked_is_an_error_of_one_line(refused, queued):
    assert f"{queued} is queued" in refused("runs", "wait", queued, "--timeout", 0)


def test_a_paused_run_in_the_foreground_says_how_to_go_on(
    weft, ledger, run_yaml, monkeypatch, read
):
    monkeypatch.setattr("storage.queue.RunQueue.wanted", lambda self, run, token: "pause")
    code, _, err = weft("run", run_yaml())
    [run] = read("runs", "list")
    assert (code, run["status"]) == (2, "paused")
    assert err == f"error: run {run['id']} is paused; go on with: weft runs resume {run['id']}\n"


def test_signals_stop_a_coordinator_and_are_given_back(ok, queued, read, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    real = progress.RunProgress

    def told_to_stop(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(progress, "RunProgress", told_to_stop)
    assert "drove 1 runs" in ok("coordinator")
    assert read("runs", "show", queued)["status"] == "queued"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_costs_too_many_drivers_is_failed_by_the_next_and_resumed_by_hand(
    ok, weft, queued, ledger
):
    for _ in range(2):
        ledger.queue.claim("elsewhere:1:x:y", 1e-6)
    ok("coordinator", "--until-idle", "--max-claims", "2")
    code, said, _ = weft("runs", "wait", queued)
    assert code == 1
    assert f"{queued} failed run {queued} was claimed 2 times without a round committed" in said
    ok("run", "--resume", queued)
    assert ledger.run(queued).status == "completed"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["coordinator", "--limit", "a100"], "--limit takes key=value:count such as gpu=a100:2"),
        (["coordinator", "--limit", "gpu=a100:many"], "got 'gpu=a100:many'"),
        (["coordinator", "--limit", "=a100:2"], "got '=a100:2'"),
        (["runs", "pause", "nope"], "'nope'"),
        (["runs", "resume", "nope"], "'nope'"),
        (["runs", "cancel", "nope"], "'nope'"),
        (["runs", "extend", "nope", "--rounds", "+1"], "'nope'"),
        (["runs", "clone", "nope"], "'nope'"),
        (["runs", "wait", "nope"], "'nope'"),
        (["runs", "log", "nope", "--follow"], "'nope'"),
        (["runs", "list", "--before", "nope"], "'nope'"),
        (["runs", "list", "--status", "lost"], "a run's status is one of queued, running, paused"),
        (["run", "--resume", "x", "--detach"], "weft runs resume RUN queues it"),
        (["run", "x.yaml", "--detach", "--label", "gpu"], "--label takes key=value, got 'gpu'"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(refused, argv, message):
    assert message in refused(*argv)


def test_a_run_is_refused_before_it_is_queued(refused, read, run_yaml):
    assert "no adapter is called 'lorra'" in refused("run", run_yaml(adapter="lorra"), "--detach")
    assert read("runs", "list") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["--rounds", "1"], "1 are not more"), (["--rounds", "x"], "such as +10 (more) or 40")],
)
def test_an_extension_that_is_none_is_refused(refused, queued, changes, message):
    assert message in refused("runs", "extend", queued, *changes)
