import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as NoConnection

from orchestrator import lease
from orchestrator.lease import Lease, driver_name, is_dead
from storage.ledger import LeaseLost

NAME = "import orchestrator.lease as l; print(l.driver_name())"


class Renewals:
    """A queue that answers each renewal with the next of ``answers``, then with success."""

    def __init__(self, *answers):
        self.answers, self.calls, self.enough = list(answers), [], threading.Event()

    def renew(self, run, token, lease_s):
        self.calls.append((run, token, lease_s))
        if len(self.calls) >= 3:
            self.enough.set()
        if self.answers:
            raise self.answers.pop(0)


def test_this_process_is_not_dead_and_its_name_says_where_it_is():
    assert driver_name().split(":")[1] == str(os.getpid())
    assert not is_dead(driver_name())


def test_a_process_of_this_host_that_ended_is_dead():
    done = subprocess.run([sys.executable, "-c", NAME], capture_output=True, text=True, check=True)
    assert is_dead(done.stdout.strip())


def test_a_later_process_with_the_same_id_is_another():
    host, pid, mark, _ = driver_name().rsplit(":", 3)
    assert is_dead(f"{host}:{pid}:{mark}:1")


def test_a_process_that_nobody_has_reaped_is_dead():
    command = [sys.executable, "-c", NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        name = child.stdout.read().strip()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays listed
        assert is_dead(name)


@pytest.mark.parametrize("owner", ["elsewhere:1:00000000:1", "me:1", "", "a:b:c:d:e"])
def test_of_a_process_elsewhere_nothing_is_known(owner):
    assert not is_dead(owner)


def test_where_there_is_no_proc_a_process_is_asked_for_by_its_id(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "_PROC", tmp_path)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert lease._birth(os.getpid()) == "alive"
    assert lease._birth(done.pid) == "gone"


def test_a_lease_is_renewed_until_it_is_left():
    queue = Renewals()
    with Lease(queue, "r", 7, 0.03) as held:
        assert queue.enough.wait(30)
    assert set(queue.calls) == {("r", 7, 0.03)}
    assert not held._thread.is_alive()


def test_a_lease_is_renewed_again_when_the_database_is_back(workspace, caplog):
    queue = workspace.ledger.queue
    workspace.ledger.create_run("r", "r", {}, {})
    token = queue.claim("me", 60).token
    refused, back, renewed = threading.Event(), threading.Event(), threading.Event()

    def executing(cursor, statement, parameters, context):
        if not back.is_set():
            refused.set()
            raise sqlite3.OperationalError("disk I/O error")

    def executed(connection, cursor, statement, *rest):
        if statement.startswith("UPDATE runs SET lease_until"):
            renewed.set()

    event.listen(workspace.engine, "do_execute", executing)
    event.listen(workspace.engine, "after_cursor_execute", executed)
    with Lease(queue, "r", token, 0.03):
        assert refused.wait(30)
        back.set()
        assert renewed.wait(30)
    assert "the lease on run r was not renewed: the store at sqlite" in caplog.text


def test_a_database_that_has_no_connection_free_is_asked_again(caplog):
    queue = Renewals(NoConnection("the pool is used up"))
    with Lease(queue, "r", 7, 0.03):
        assert queue.enough.wait(30)
    assert "the lease on run r was not renewed" in caplog.text


def test_a_lost_lease_is_not_asked_for_again():
    queue = Renewals(LeaseLost("oh"))
    with Lease(queue, "r", 7, 0.03) as held:
        held._thread.join(30)
        assert not held._thread.is_alive()
    assert len(queue.calls) == 1
