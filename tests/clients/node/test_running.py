"""A node's child: how it is started, started again, and ended."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from clients import flower_program
from clients.node import running
from clients.node.running import (
    AlreadyRunning,
    NotLetIn,
    SuperNode,
    alone,
    start,
    stopped_by_signals,
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that puts a script in the place of Flower's SuperNode."""

    def put(code):
        path = tmp_path / "flower-supernode"
        path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{code}\n")
        path.chmod(0o700)
        monkeypatch.setattr(running, "_program", lambda: [str(path)])

    return put


@pytest.fixture
def settings(node):
    made = node()
    made.state.mkdir(mode=0o700)
    return made


def never(order):
    pytest.fail("nothing was asked")


def test_the_child_dials_out_and_is_told_its_secrets_by_files(settings, program):
    program("")
    child = SuperNode(settings, threading.Event())

    words = child.command()

    assert words[1:5] == ["--superlink", "weft.example.org:443", "--isolation", "process"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--auth-supernode-private-key") + 1] == str(settings.key)
    assert "--insecure" not in words
    secret = settings.state / "supernode.secret"
    assert words[words.index("--superexec-auth-secret-file") + 1] == str(secret)
    assert secret.read_bytes() == child.secret
    assert child.secret.decode() not in " ".join(words)
    assert secret.stat().st_mode & 0o077 == 0


def test_the_child_asks_its_maker_for_nothing(settings, program, tmp_path):
    names = [*flower_program.SWITCHES, "FLWR_HOME"]
    program(
        f"open({str(tmp_path / 'seen')!r}, 'w').write(repr([os.environ[n] for n in {names}]))\n"
        "print('Exit Code: 305', '[code: 2004]')"
    )
    SuperNode(settings, threading.Event()).keep()

    assert (tmp_path / "seen").read_text() == repr(["0", "1", "1", str(settings.state / "flwr")])


def test_a_node_that_is_not_let_in_ends_with_a_sentence(settings, program):
    program("print('Exit Code: 305'); print('[code: 2004] Failed to activate.'); sys.exit(1)")
    stop = threading.Event()

    with pytest.raises(NotLetIn, match="has expired, or was disabled"):
        start(settings, lambda address, secret, answer, end: end.wait(60), stop, never)

    assert stop.is_set()


def test_a_node_that_died_tries_on_while_the_superlink_takes_it_to_be_there(
    settings, program, tmp_path, monkeypatch
):
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: self.is_set())
    count = tmp_path / "count"
    program(
        f"open({str(count)!r}, 'a').write('x')\n"
        f"n = os.path.getsize({str(count)!r})\n"
        "if n in (1, 4): print('SuperNode ID: 7', flush=True)\n"
        "if n == 1: os.kill(os.getpid(), 9)\n"  # it says no goodbye
        "if n == 4: sys.exit(0)\n"  # it is told to go
        "print('Exit Code: 305', '[code: 2004]')\n"
        "sys.exit(1)"
    )
    child = SuperNode(settings, threading.Event())
    child.keep()

    assert count.read_text() == "xxxxx"
    assert child.problem is not None


def test_a_child_that_ends_is_started_again(settings, program, tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: self.is_set())
    count = tmp_path / "count"
    program(
        f"open({str(count)!r}, 'a').write('x')\n"
        f"if os.path.getsize({str(count)!r}) < 3: sys.exit(1)\n"
        "print('Exit Code: 305', '[code: 2004]')"
    )
    SuperNode(settings, threading.Event()).keep()

    assert count.read_text() == "xxx"


def test_stopping_ends_the_child(settings, program, tmp_path):
    up = tmp_path / "up"
    os.mkfifo(up)
    program(f"open({str(up)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    pids = []

    def serve(address, secret, answer, end):
        pids.append(int(up.read_text()))  # waits for the child
        end.set()

    start(settings, serve, threading.Event(), never)

    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_what_goes_wrong_in_answering_ends_the_child_too(settings, program):
    program("time.sleep(600)")
    stop = threading.Event()

    def serve(address, secret, answer, end):
        raise ConnectionRefusedError("another Flower version")

    with pytest.raises(ConnectionRefusedError):
        start(settings, serve, stop, never)

    assert stop.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_child_ends_with_a_parent_that_is_killed():
    code = (
        "import os, subprocess, sys, time; from clients.flower_program import WITH_PARENT\n"
        "child = 'import time; print(1, flush=True); time.sleep(600)'\n"
        "argv = [sys.executable, '-c', WITH_PARENT, str(os.getpid()), sys.executable]\n"
        "subprocess.Popen([*argv, '-c', child]); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"1\n"
        parent.kill()
        assert parent.stdout.read() == b""  # ends where the child, which has it too, does


def test_two_nodes_of_one_state_cannot_run(settings):
    with alone(settings), pytest.raises(AlreadyRunning, match="clinic-7 runs already"):
        alone(settings).__enter__()
    with alone(settings):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_node_and_nothing_after_it(number):
    before, stop = signal.getsignal(number), threading.Event()

    with stopped_by_signals(stop):
        signal.raise_signal(number)
        assert stop.is_set()

    assert signal.getsignal(number) is before
    left = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(timer.finished.is_set() for timer in left)
