"""Keys are there while a run can go on, and gone when it is closed, whoever dies in between."""

import shutil

import pytest

from orchestrator import federation, service, upkeep
from orchestrator.closing import begin_closing, finish_closing
from orchestrator.desk import Desk

DP = {"noise_multiplier": 2.0, "delta": 1e-3}


class Killed(BaseException):
    """The process is gone."""


def keys(home):
    """Return the clients' keys of a home, and what is left of them."""
    found = [*home.home.glob("sites/*/key"), *home.home.glob("sites/*/.*")]
    return {path.read_bytes() for path in found}


@pytest.fixture
def drawn(monkeypatch):
    """Every key that was drawn for a client in a run."""
    from clients import keys as module

    made, new_key = [], module.new_key

    def noted():
        made.append(new_key())
        return made[-1]

    monkeypatch.setattr(module, "new_key", noted)
    return made


def test_keys_are_destroyed_when_a_run_is_completed_and_drawn_anew_when_it_is_extended(
    home, tiny, drawn
):
    service.launch(home, tiny(rounds=1, privacy=DP))
    run = home.ledger.runs()[0].id
    first, spent = len(drawn), len(home.ledger.spends_of_run(run))
    assert first > spent == 2  # theirs, and the one that the site says what data are the same with
    assert keys(home) == set()

    service.extend(home, run, "+1")
    service.resume(home, run)

    assert home.ledger.runs()[0].status == "completed"
    assert len(drawn) - first == spent
    assert len(home.ledger.spends_of_run(run)) == 2 * spent
    assert keys(home) == set()
    assert list(home.home.glob("closing/*")) == []


def test_who_is_late_is_given_up_before_keys_are_destroyed(home, tiny, monkeypatch):
    done = []

    def noted(owner, name):
        call = getattr(owner, name)

        def first(*given):
            done.append(name)
            return call(*given)

        monkeypatch.setattr(owner, name, first)

    noted(federation, "begin_closing")
    noted(Desk, "give_up")
    service.launch(home, tiny(rounds=1, privacy=DP, late="keep", strategy="ffa-lora"))
    assert done[:2] == ["give_up", "begin_closing"]


@pytest.mark.parametrize("status", ["paused", "failed", "running"])
def test_a_run_that_can_go_on_keeps_its_keys(workspace, spent, status):
    spent("r", status)
    begin_closing(workspace.home, "r", {"privacy": DP})

    finish_closing(workspace.home, workspace.ledger)

    assert len(keys(workspace)) == 2


@pytest.fixture
def spent(workspace):
    """Return a function that makes a run with spends and keys of two clients, as it stands."""
    from clients.site import Site
    from storage.ledger import SpendRow

    def make(run, status):
        workspace.ledger.create_run(run, "x", {"privacy": DP}, {}, rounds=3)
        for client in ("a", "b"):
            parameters = {"noise_multiplier": 2.0, "sample_rate": 0.1, "steps": 1.0}
            facts = (client, run, 1, "d", "gaussian", "example", "add-remove", parameters)
            workspace.ledger.record_spend(SpendRow(f"{run}{client}", client, *facts))
            Site(workspace.sites).run_key(run, client)
        workspace.ledger.record(run, status, {}, status=status)

    return make


@pytest.mark.parametrize("status", ["completed", "cancelled"])
@pytest.mark.parametrize("opportunity", ["gc", "another run's end"])
def test_who_dies_between_the_end_and_the_keys_leaves_them_to_the_next(
    workspace, spent, status, opportunity
):
    spent("r", "paused")
    spent("other", "paused")
    begin_closing(workspace.home, "r", {"privacy": DP})
    workspace.ledger.record("r", status, {}, status=status)
    assert len(keys(workspace)) == 4

    if opportunity == "gc":
        upkeep.gc(workspace)
        assert len(keys(workspace)) == 4  # a dry run
        upkeep.gc(workspace, delete=True)
        assert len(keys(workspace)) == 2
    else:
        service.cancel(workspace, "other")
        assert keys(workspace) == set()
    assert list(workspace.home.glob("closing/*")) == []


@pytest.mark.parametrize("status", ["paused", "failed", "queued"])
def test_a_run_that_is_cancelled_loses_its_keys(workspace, spent, status):
    spent("r", status)
    service.cancel(workspace, "r")
    assert keys(workspace) == set()


def test_a_run_of_another_database_keeps_its_keys(workspace, spent):
    spent("r", "paused")
    begin_closing(workspace.home, "elsewhere", {"privacy": DP})

    finish_closing(workspace.home, workspace.ledger)

    assert len(keys(workspace)) == 2
    assert [note.name for note in workspace.home.glob("closing/*")] == ["elsewhere"]


def test_a_run_without_keys_leaves_no_note(workspace):
    for config in ({}, {"privacy": None}, {"privacy": {**DP, "insecure_seed": 7}}):
        begin_closing(workspace.home, "r", config)
    assert not (workspace.home / "closing").exists()


def test_a_round_that_is_asked_again_of_a_site_that_lost_everything_costs_again(home, tiny):
    def dies(kind, data):
        if kind == "assigned":
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        service.launch(home, tiny(rounds=2, privacy=DP), dies)
    run = home.ledger.runs()[0].id
    before = {row.event for row in home.ledger.spends_of_run(run)}
    shutil.rmtree(home.sites)

    service.resume(home, run)

    rows = home.ledger.spends_of_run(run)
    assert sorted((row.client, row.round) for row in rows if row.event not in before) == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]
    assert {row.event for row in rows} > before


def test_a_driver_killed_when_its_run_was_completed_is_cleaned_up_after_before_the_run_goes_on(
    home, tiny, monkeypatch, drawn
):
    def dies(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.federation.finish_closing", dies)
        with pytest.raises(Killed):
            service.launch(home, tiny(rounds=1, privacy=DP))
    record = home.ledger.runs()[0]
    assert record.status == "completed"
    assert len(keys(home)) == 2

    service.extend(home, record.id, "+1")

    assert keys(home) == set()
