"""What people do to a run that exists, as its record and its log show it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.service import RunRefused
from storage.ledger import UnknownRun

DP = {"epsilon": 8, "delta": 1e-3, "insecure_seed": 7}


@pytest.fixture
def run(workspace):
    """Return the id of a queued run; nothing of it can be driven."""
    return workspace.ledger.create_run("r", "x", {}, {}, rounds=3).id


def stands(workspace, run, status):
    workspace.ledger.record(run, status, {}, status=status)


def kinds(workspace, run):
    return [e.kind for e in workspace.ledger.events(run)]


@pytest.mark.parametrize(
    ("ask", "status"), [(service.pause, "paused"), (service.cancel, "cancelled")]
)
def test_a_waiting_run_stops_at_once_and_asking_again_changes_nothing(workspace, run, ask, status):
    assert ask(workspace, run).status == status
    assert ask(workspace, run).status == status
    assert kinds(workspace, run) == ["queued", status]


@pytest.mark.parametrize(("ask", "wish"), [(service.pause, "pause"), (service.cancel, "cancel")])
def test_a_driven_run_is_told_and_asking_again_changes_nothing(workspace, run, ask, wish):
    workspace.ledger.queue.claim("elsewhere:1", 60)
    assert (ask(workspace, run).status, ask(workspace, run).wanted) == ("running", wish)
    assert workspace.ledger.queue.wanted(run, 1) == wish
    assert kinds(workspace, run) == ["queued", "claimed", "wanted"]


def test_a_wish_to_pause_is_taken_back(workspace, run):
    workspace.ledger.queue.claim("elsewhere:1", 60)
    service.pause(workspace, run)
    assert service.requeue(workspace, run).wanted == "run"


@pytest.mark.parametrize("ask", [service.pause, service.cancel])
def test_a_run_whose_driver_died_stops_at_once_and_the_driver_may_not_come_back(
    workspace, run, ask
):
    workspace.ledger.queue.claim("elsewhere:1", 1e-9)
    assert ask(workspace, run).status in ("paused", "cancelled")
    assert workspace.ledger.run(run).token == 2


@pytest.mark.parametrize(
    ("ask", "status", "message"),
    [
        (service.pause, "completed", "is completed; only one that goes on can be paused"),
        (service.pause, "failed", "is failed; only one"),
        (service.cancel, "completed", "is completed already"),
        (service.requeue, "completed", r"for more rounds: weft runs extend r --rounds \+10"),
        (service.requeue, "cancelled", "weft runs clone r"),
    ],
)
def test_what_has_ended_stays_as_it_is(workspace, run, ask, status, message):
    stands(workspace, run, status)
    with pytest.raises(RunRefused, match=message):
        ask(workspace, run)
    assert workspace.ledger.run(run).status == status


def test_a_run_that_failed_can_be_cancelled_and_is_not_resumed(workspace, run):
    stands(workspace, run, "failed")
    assert service.cancel(workspace, run).status == "cancelled"
    with pytest.raises(RunRefused, match="is cancelled"):
        service.requeue(workspace, run)


@pytest.mark.parametrize("status", ["paused", "failed"])
def test_a_run_that_stopped_is_queued_again(workspace, run, status):
    stands(workspace, run, status)
    assert service.requeue(workspace, run).status == "queued"
    assert service.requeue(workspace, run).status == "queued"
    assert kinds(workspace, run) == ["queued", status, "queued"]


def test_a_decision_that_was_overtaken_is_made_again(workspace, run, monkeypatch):
    queue, real = workspace.ledger.queue, workspace.ledger.queue.is_driven

    def overtaken(asked):
        monkeypatch.setattr(queue, "is_driven", real)
        queue.claim("elsewhere:1", 60)
        return False

    monkeypatch.setattr(queue, "is_driven", overtaken)
    record = service.pause(workspace, run)
    assert (record.status, record.wanted, record.token) == ("running", "pause", 1)


def test_an_unknown_run_is_refused(workspace):
    for ask in (service.pause, service.cancel, service.requeue):
        with pytest.raises(UnknownRun):
            ask(workspace, "nothing")


# --- extend -----------------------------------------------------------------------------------


def extended(home, config, rounds):
    """Run a config to its end, extend it, go on, and return the last version."""
    service.launch(home, config)
    run = home.ledger.runs()[0].id
    record = service.extend(home, run, rounds)
    assert record.status == "queued"
    return service.resume(home, run)


@pytest.mark.parametrize("rounds", ["+2", "3"])
def test_a_completed_run_goes_on_to_the_version_of_a_longer_run(home, tiny, rounds):
    wanted = service.launch(home, tiny(rounds=3))
    assert extended(home, tiny(rounds=1), rounds) == wanted
    record = home.ledger.runs()[0]
    assert (record.round, record.rounds, record.status) == (3, 3, "completed")


def test_a_paused_run_stays_paused_with_more_rounds(workspace, home, tiny):
    run = service.submit(home, tiny(rounds=1))
    service.pause(home, run)
    record = service.extend(home, run, "+4")
    assert (record.status, record.rounds) == ("paused", 5)


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ("2", "has 2 rounds already, and 2 are not more"),
        ("+0", "rounds must be a number such as"),
        ("ten", "got 'ten'"),
        ("-3", "got '-3'"),
    ],
)
def test_rounds_that_are_not_more_are_refused(home, tiny, rounds, message):
    run = service.submit(home, tiny(rounds=2))
    with pytest.raises(RunRefused, match=message):
        service.extend(home, run, rounds)


def test_a_driven_or_cancelled_run_is_not_extended(home, tiny):
    run = service.submit(home, tiny())
    home.ledger.queue.claim("elsewhere:1", 60)
    with pytest.raises(RunRefused, match=f"pause it first with: weft runs pause {run}"):
        service.extend(home, run, "+1")
    home.ledger.queue.release(run, 1, "stopped")
    service.cancel(home, run)
    with pytest.raises(RunRefused, match="is cancelled; clone it"):
        service.extend(home, run, "+1")


def test_more_rounds_than_the_noise_was_calibrated_for_are_refused(home, tiny):
    run = service.submit(home, tiny(rounds=2, privacy=DP))
    with pytest.raises(RunRefused, match=r"2 rounds spend ε = 8 \(δ = 0.001\); more would spend"):
        service.extend(home, run, "+1")
    many = {**DP, "max_participations": 3}  # more than its rounds: calibrated for two all the same
    run = service.submit(home, tiny(rounds=2, privacy=many))
    with pytest.raises(RunRefused, match="at most its rounds has room for others"):
        service.extend(home, run, "+1")
    assert home.ledger.run(run).rounds == 2


def test_rounds_for_which_clients_have_participations_left_spend_no_more_than_planned(home, tiny):
    privacy = {**DP, "max_participations": 1}
    config = tiny(rounds=1, cohort=1, privacy=privacy)
    wanted = service.launch(home, tiny(rounds=2, cohort=1, privacy=privacy))
    service.launch(home, config)
    run = home.ledger.runs()[0].id
    with pytest.raises(RunRefused, match=r"can have 2 rounds at most: .* taken part in 1 "):
        service.extend(home, run, "+2")
    service.extend(home, run, "+1")
    assert service.resume(home, run) == wanted
    spends = home.ledger.spends_of_run(run)
    assert sorted(s.client for s in spends) == ["a", "b"]
    assert [s.round for s in spends] == [1, 2]


def test_with_the_noise_given_more_rounds_spend_more_and_say_so(home, tiny):
    noise = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}
    wanted = service.launch(home, tiny(rounds=2, privacy=noise))
    assert extended(home, tiny(rounds=1, privacy=noise), "+1") == wanted
    assert len(home.ledger.spends_of_run(home.ledger.runs()[0].id)) == 4


def test_a_run_that_remembers_its_own_task_is_not_trained_on_against_it(home, tiny):
    method = {"name": "o-lora", "form": "hard"}
    config = tiny(rounds=2, strategy="fedsvd", regularizers=[method])
    service.launch(home, config)
    with pytest.raises(RunRefused, match="put its task into its memory when it ended"):
        service.extend(home, "task-1", "+1")
    waiting = service.submit(home, config)
    assert service.extend(home, waiting, "+1").rounds == 3


# --- clone ------------------------------------------------------------------------------------


def test_a_clone_is_the_same_run_but_for_what_is_changed(home, tiny):
    config = tiny(rounds=2, strategy="fedsvd")
    version = service.launch(home, config)
    same = service.clone(home, "task-1")
    assert service.launch(home, same) == version
    changed = service.clone(home, "task-1", ["rounds=1", "adapter.r=1", "name=other"])
    assert (changed.rounds, changed.name) == (1, "other")
    assert changed.adapter.options["r"] == 1
    with pytest.raises(BadConfig, match="rounds"):
        service.clone(home, "task-1", ["rounds=0"])


def test_a_run_of_relative_paths_is_cloned_from_another_folder(
    home, tiny, notes, tmp_path, monkeypatch, tiny_encoder
):
    notes("rows")
    (tmp_path / "model").symlink_to(tiny_encoder)
    monkeypatch.chdir(tmp_path)
    places = {
        "model": {"id": "model", "max_length": 16},
        "clients": {"simulate": {"data": "jsonl:rows.jsonl", "by": "iid", "parts": 2}},
    }
    run = service.submit(home, tiny(**places))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert service.launch(home, service.clone(home, run)) == service.resume(home, run)


# --- watch ------------------------------------------------------------------------------------


def test_a_log_is_read_to_its_end_and_followed_to_the_run_s(workspace, run):
    ledger = workspace.ledger
    assert [e.kind for e in service.log(workspace, run)] == ["queued"]
    following = service.log(workspace, run, follow=True, poll_s=0.001)
    assert next(following).kind == "queued"
    ledger.record(run, "round", {"round": 1})
    assert next(following).kind == "round"
    ledger.record(run, "completed", {}, status="completed")
    assert [e.kind for e in following] == ["completed"]


def test_a_log_longer_than_a_page_is_read_whole_and_once(workspace, run, monkeypatch):
    monkeypatch.setattr("orchestrator.watching._PAGE", 3)
    for n in range(7):
        workspace.ledger.record(run, "tick", {"n": n})
    assert [e.seq for e in service.log(workspace, run)] == list(range(1, 9))


def test_waiting_ends_when_the_last_run_does(workspace, run):
    other = workspace.ledger.create_run("s", "y", {}, {}).id
    stands(workspace, other, "failed")
    with pytest.raises(service.WaitedTooLong, match="after 0 s r is queued; wait longer"):
        service.wait(workspace, [run, other], timeout_s=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.wait, workspace, [run, "y"], 60, 0.001)
        stands(workspace, run, "completed")
        assert [r.status for r in waiting.result(60)] == ["completed", "failed"]
