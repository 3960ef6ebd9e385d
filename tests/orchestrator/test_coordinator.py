"""Driving queued runs, in this process, on a tiny encoder and real training."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from clients.sources import MissingExtra
from orchestrator import coordinator, recipes, service
from orchestrator.config import parse_config
from orchestrator.coordinator import Drifted, Driving, RunBusy, Serving, Stopped
from orchestrator.federation import Cancelled, Paused
from orchestrator.lease import driver_name
from storage.ledger import LeaseLost, Queueing

IDLE = Serving(until_idle=True)


def quiet(kind, data):
    pass


def serve(home, observe=quiet, serving=IDLE, **driving):
    @contextmanager
    def watch():
        yield observe

    return service.serve(home, serving, Driving(**driving), watch)


def claimed(home, run):
    return home.ledger.queue.claim(driver_name(), 60, run=run)


def at(kind, act, count=1):
    """Return an observer that calls ``act()`` at the ``count``-th event of ``kind``."""
    seen = []

    def observe(which, data):
        seen.append(which)
        if which == kind and seen.count(kind) == count:
            act()

    return observe


def kinds(home, run):
    return [e.kind for e in home.ledger.events(run)]


def test_queued_runs_are_driven_by_priority_to_the_versions_they_would_have_had(home, tiny):
    wanted = [service.launch(home, tiny(seed=seed)) for seed in (1, 2)]
    low = service.submit(home, tiny(seed=1))
    high = service.submit(home, tiny(seed=2), Queueing(priority=3))
    order = []

    def observe(kind, data):
        if kind == "run":
            order.append(data["run"])

    assert serve(home, observe) == 2
    assert order == [high, low]
    assert [home.ledger.run(run).version for run in (low, high)] == wanted
    assert {home.ledger.run(run).status for run in order} == {"completed"}


def test_a_coordinator_that_looks_once_drives_one_run_or_none(home, tiny):
    first, second = (service.submit(home, tiny(seed=seed)) for seed in (1, 2))
    once = Serving(once=True)
    assert serve(home, serving=once) == 1
    assert [home.ledger.run(run).status for run in (first, second)] == ["completed", "queued"]
    assert serve(home, serving=once) == 1
    assert serve(home, serving=once) == 0


def test_a_limit_keeps_a_run_waiting_while_others_go(home, tiny):
    held = service.submit(home, tiny(), Queueing(priority=9, labels={"gpu": "a100"}))
    free = service.submit(home, tiny(seed=1))
    assert serve(home, serving=Serving({"gpu=a100": 0}, once=True)) == 1
    assert serve(home, serving=Serving({"gpu=a100": 0}, once=True)) == 0
    assert [home.ledger.run(run).status for run in (held, free)] == ["queued", "completed"]


def test_a_run_that_fails_keeps_nobody_waiting(home, tiny):
    doomed = service.submit(home, tiny(clients={"names": ["a"]}))
    good = service.submit(home, tiny(clients={"names": ["b"]}))
    Path(home.ledger.client("a").data.removeprefix("jsonl:")).unlink()
    assert serve(home) == 2
    assert home.ledger.run(doomed).status == "failed"
    assert "no update could be accepted (a: " in home.ledger.run(doomed).error
    assert home.ledger.run(good).status == "completed"


def test_a_plan_that_cannot_be_read_fails_its_run_and_no_other(home, tiny, caplog):
    home.ledger.create_run("odd", "odd", {}, {"not": "a plan"}, rounds=1)
    good = service.submit(home, tiny())
    assert serve(home) == 2
    assert home.ledger.run("odd").status == "failed"
    assert "run odd failed" in caplog.text
    assert home.ledger.run(good).status == "completed"


def die(home, run):
    """Claim a run as a process elsewhere that is never heard of again, and whose lease is over."""
    assert home.ledger.queue.claim("elsewhere:1:x:y", 1e-6, run=run) is not None


def test_a_run_that_costs_every_driver_fails_with_a_sentence_and_keeps_nobody_waiting(home, tiny):
    doomed, good = (service.submit(home, tiny(), Queueing(priority=p)) for p in (1, 0))
    for _ in range(3):
        die(home, doomed)
    assert serve(home, max_claims=3) == 2
    record = home.ledger.run(doomed)
    assert (record.status, record.round, record.owner) == ("failed", 0, None)
    assert record.error.startswith(f"run {doomed} was claimed 3 times")
    assert f"weft run --resume {doomed}" in record.error
    assert kinds(home, doomed) == ["queued", *["claimed"] * 4, "failed"]
    assert home.ledger.run(good).status == "completed"


@pytest.mark.parametrize("resume", [service.resume, service.requeue])
def test_a_run_that_was_claimed_too_often_goes_on_when_people_say_so(home, tiny, resume):
    run = service.submit(home, tiny())
    for _ in range(2):
        die(home, run)
    serve(home, max_claims=2)
    resume(home, run)
    serve(home, max_claims=2)
    assert home.ledger.run(run).status == "completed"


def test_a_run_that_commits_rounds_may_be_claimed_as_often_as_it_takes(home, tiny):
    class Killed(BaseException):
        """The process is gone."""

    def kill():
        raise Killed

    run = service.submit(home, tiny(rounds=2))
    for _ in range(2):
        die(home, run)
    record = claimed(home, run)
    with pytest.raises(Killed):
        coordinator.drive(home, record, at("committed", kill), Driving(max_claims=3))
    home.ledger.queue.renew(run, record.token, 1e-6)
    for _ in range(2):
        die(home, run)
    assert serve(home, max_claims=3) == 1
    assert home.ledger.run(run).status == "completed"


def test_a_run_whose_coordinators_are_stopped_may_be_claimed_as_often_as_it_takes(home, tiny):
    run = service.submit(home, tiny())
    for _ in range(3):
        home.ledger.queue.release(run, claimed(home, run).token, "asked to stop")
    assert serve(home, max_claims=1) == 1
    assert home.ledger.run(run).status == "completed"


def test_a_coordinator_that_is_stopped_puts_its_run_back_and_another_ends_it(home, tiny):
    wanted = service.launch(home, tiny(rounds=2))
    run = service.submit(home, tiny(rounds=2))
    stop = threading.Event()
    assert serve(home, at("accepted", stop.set, 3), stop=stop) == 1
    record = home.ledger.run(run)
    assert (record.status, record.owner, record.round) == ("queued", None, 1)
    assert kinds(home, run)[-2:] == ["accepted", "released"]
    with pytest.raises(LeaseLost):
        home.ledger.record(run, "round", {}, token=1)
    assert serve(home) == 1
    assert home.ledger.run(run).version == wanted


def test_a_stop_at_the_very_end_leaves_the_run_completed(home, tiny):
    run, stop = service.submit(home, tiny()), threading.Event()
    assert serve(home, at("completed", stop.set), stop=stop) == 1
    assert home.ledger.run(run).status == "completed"
    assert kinds(home, run)[-1] == "completed"


def test_a_stopped_run_says_so_to_who_drives_it(home, tiny):
    record = claimed(home, service.submit(home, tiny()))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="back in the queue"):
        coordinator.drive(home, record, quiet, Driving(stop=stop))
    assert home.ledger.run(record.id).status == "queued"


def test_a_coordinator_that_cannot_wait_for_the_next_event_releases_its_run_too(home, tiny):
    run, stop = service.submit(home, tiny()), threading.Event()

    def impatient():
        stop.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(home, at("training", impatient), stop=stop)
    assert home.ledger.run(run).status == "queued"
    assert kinds(home, run)[-1] == "released"


def test_who_lost_the_lease_writes_nothing_more(home, tiny):
    record = claimed(home, service.submit(home, tiny(rounds=2)))

    def steal():
        home.ledger.queue.release(record.id, record.token, "a jump of the clock")
        home.ledger.queue.claim("elsewhere:1:x:y", 60, run=record.id)

    with pytest.raises(LeaseLost, match="elsewhere:1:x:y drives it now"):
        coordinator.drive(home, record, at("committed", steal), Driving())
    after = home.ledger.run(record.id)
    assert (after.status, after.owner, after.round) == ("running", "elsewhere:1:x:y", 1)
    assert kinds(home, record.id)[-3:] == ["committed", "released", "claimed"]


@pytest.mark.parametrize(
    ("ask", "error", "status"),
    [(service.pause, Paused, "paused"), (service.cancel, Cancelled, "cancelled")],
)
def test_a_run_stops_at_its_next_event_when_people_ask(home, tiny, ask, error, status):
    record = claimed(home, service.submit(home, tiny(rounds=3)))
    with pytest.raises(error, match=record.id):
        coordinator.drive(home, record, at("round", lambda: ask(home, record.id)), Driving())
    after = home.ledger.run(record.id)
    assert (after.status, after.round, after.owner) == (status, 0, None)
    assert kinds(home, record.id)[-1] == status
    assert "committed" not in kinds(home, record.id)


def test_a_paused_run_goes_on_to_the_version_it_would_have_had(home, tiny):
    wanted = service.launch(home, tiny(rounds=2))
    run = service.submit(home, tiny(rounds=2))
    assert serve(home, at("round", lambda: service.pause(home, run))) == 1
    assert home.ledger.run(run).status == "paused"
    assert serve(home) == 0
    assert service.requeue(home, run).status == "queued"
    assert serve(home) == 1
    assert home.ledger.run(run).version == wanted


def test_a_paused_run_is_resumed_in_the_foreground_too(home, tiny):
    run = service.submit(home, tiny())
    service.pause(home, run)
    assert service.resume(home, run) == home.ledger.run(run).version


def test_a_run_that_was_to_pause_when_its_driver_died_pauses_at_the_next(home, tiny):
    run = service.submit(home, tiny())
    home.ledger.queue.claim("elsewhere:1:x:y", 60)
    assert service.pause(home, run).wanted == "pause"
    home.ledger.queue.release(run, 1, "it died")
    assert serve(home) == 1
    assert (home.ledger.run(run).status, home.ledger.run(run).round) == ("paused", 0)


@pytest.fixture
def begun_elsewhere(home, tiny, monkeypatch):
    """Return a run that an older torch began, and that was paused after its first round."""
    older = recipes.libraries() | {"torch": "1.0"}
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "libraries", lambda: older)
        run = service.submit(home, tiny(rounds=2))
        serve(home, at("committed", lambda: service.pause(home, run)))
    assert home.ledger.run(run).status == "paused"
    return run


def test_a_run_of_other_libraries_goes_on_only_where_that_is_accepted(home, begun_elsewhere):
    with pytest.raises(Drifted, match=r"begun with torch 1\.0, here .*--accept-drift"):
        service.resume(home, begun_elsewhere)
    assert home.ledger.run(begun_elsewhere).round == 1
    version = service.resume(home, begun_elsewhere, accept_drift=True)
    assert home.ledger.run(begun_elsewhere).status == "completed"
    assert home.store.version(version).recipe["libraries"] == recipes.libraries()


def test_a_coordinator_leaves_a_run_of_other_libraries_with_a_sentence(home, begun_elsewhere):
    service.requeue(home, begun_elsewhere)
    assert serve(home) == 1
    record = home.ledger.run(begun_elsewhere)
    assert (record.status, record.round) == ("failed", 1)
    assert f"weft run --resume {begun_elsewhere} --accept-drift" in record.error


def test_a_run_that_is_driven_elsewhere_is_not_taken(home, tiny):
    run = service.submit(home, tiny())
    home.ledger.queue.claim("elsewhere:1:x:y", 60)
    with pytest.raises(RunBusy, match=rf"driving run {run} \(elsewhere:1:x:y\) until \d\d:"):
        service.resume(home, run)
    assert home.ledger.run(run).token == 1


def test_a_cancelled_run_is_not_resumed(home, tiny):
    run = service.submit(home, tiny())
    service.cancel(home, run)
    with pytest.raises(service.RunRefused, match="is cancelled; clone it"):
        service.resume(home, run)
    assert serve(home) == 0


def test_without_ray_a_run_on_ray_says_what_to_install(document, monkeypatch):
    monkeypatch.setattr(coordinator, "find_spec", lambda name: None)

    with pytest.raises(
        MissingExtra, match=r"pip install 'weft\[ray\]', or set backend.name: inline"
    ):
        coordinator.make_backend(parse_config(document(backend="ray")), 1)
