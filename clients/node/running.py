"""A node that runs: Flower's SuperNode as a child that dials out, and a process that answers.

The child talks to the SuperLink and runs no code; each message goes to this process, which does
with it what the installed weft does. The child is started again where it ends, unless the
SuperLink does not let this node in. Whatever ends this process ends the child with it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias

from clients import flower_program
from clients.files import write_durably
from clients.node.settings import Settings

if TYPE_CHECKING:
    from clients.orders import Order

_LOG = logging.getLogger(__name__)
_NOT_LET_IN = ("Exit Code: 305", "[code: 2004]")
_LET_IN = "SuperNode ID:"
_STILL_ONLINE_S = 75.0
"""A SuperLink takes a node that died to be there for 30 s (an older one's, for 60), and lets it in
anew after them."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_CONNECTION = "Connection attempt failed"
_LONGEST_PAUSE_S = 60.0
_GRACE_S = 5.0  # for the child to say goodbye
_PATIENCE_S = 15.0  # for what does not stop at a step, such as loading a base model


class NotLetIn(RuntimeError):
    """The SuperLink does not know this node's key, or not any more."""


class AlreadyRunning(RuntimeError):
    """A node runs with this node.yaml."""


class NoFlower(ImportError):
    """Flower's SuperNode is not installed beside weft."""


Answer: TypeAlias = "Callable[[Order], bytes]"
Serve: TypeAlias = Callable[[str, bytes, Answer, threading.Event], None]
"""Answers a SuperNode at an address that knows a secret, until the event is set."""


def start(settings: Settings, serve: Serve, stop: threading.Event, answer: Answer) -> None:
    """Run a node until it is stopped.

    Args:
        settings: of the node, looked at by :mod:`clients.node.checks`.
        serve: how messages come.
        stop: set when the node is to end; it is set when this returns.
        answer: what is done with an order; to end soon, it must look at ``stop``.

    Raises:
        NotLetIn: if the SuperLink does not let this node in.
        NoFlower: if there is no SuperNode to start.
    """
    child = SuperNode(settings, stop)
    watching = threading.Thread(target=child.keep, name="supernode")
    watching.start()
    try:
        serve(child.address, child.secret, answer, stop)
    finally:
        stop.set()
        child.end()
        watching.join()
    if child.problem is not None:
        raise child.problem


class SuperNode:
    """The child process of Flower's that dials the SuperLink, and is kept alive.

    Args:
        settings: of the node.
        stop: when set, the child is not started again; set by this where it is of no use to.

    Raises:
        NoFlower: if it is not installed.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings, self._stop = settings, stop
        self._program = _program()
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._port = _free_port()
        self._secret_file = settings.state / "supernode.secret"
        self._online = settings.state / "online"  # from when it is let in until it says goodbye
        self.secret = secrets.token_hex(32).encode()
        self.problem: NotLetIn | None = None
        write_durably(self._secret_file, self.secret)  # which nobody else can read

    @property
    def address(self) -> str:
        """Where it hands out messages."""
        return f"127.0.0.1:{self._port}"

    def command(self) -> list[str]:
        """Return the child's command line; its secrets are in files."""
        settings = self._settings
        words = [*self._program, "--superlink", settings.superlink, "--isolation", "process"]
        words += ["--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--superexec-auth-secret-file", str(self._secret_file)]
        if settings.insecure:
            return [*words, "--insecure"]
        if settings.root_certificates is not None:
            words += ["--root-certificates", str(settings.root_certificates)]
        return [*words, "--auth-supernode-private-key", str(settings.key)]

    def keep(self) -> None:
        """Start the child, and start it again, until it is stopped or not let in."""
        pause, began = 1.0, time.monotonic()
        while not self._stop.is_set():
            connected = self._once()
            if self.problem is not None:
                if self._online.exists() and time.monotonic() - began < _STILL_ONLINE_S:
                    self.problem = None  # it says the same of a key that it does not know
                    _LOG.warning("it died, and the SuperLink takes it to be there yet; trying on")
                    self._stop.wait(5.0)
                    continue
                self._stop.set()
                return
            began = time.monotonic()
            pause = 1.0 if connected else min(2 * pause, _LONGEST_PAUSE_S)
            if not self._stop.is_set():
                _LOG.warning("the SuperNode ended; it is started again in %.0f s", pause)
            self._stop.wait(pause)

    def end(self) -> None:
        """End the child, which may take some seconds to say goodbye."""
        with self._lock:
            child = self._child
        if child is None or child.poll() is not None:
            return
        flower_program.end(child, _GRACE_S)

    def _once(self) -> bool:
        """Run the child until it ends; return whether it had been let in."""
        with self._lock:
            if self._stop.is_set():
                return False
            self._child = subprocess.Popen(
                flower_program.bound(self.command()),
                env=flower_program.environment(self._settings.state / "flwr"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for this process, which ends it
            )
        return self._heard(self._child)

    def _heard(self, child: subprocess.Popen[str]) -> bool:
        """Read what the child says until it ends; return whether it had been let in."""
        said: deque[str] = deque(maxlen=40)
        waiting = let_in = False
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                said.append(_COLOURS.sub("", line).rstrip())
                _LOG.debug("supernode: %s", said[-1])
                if _LET_IN in line:
                    let_in = True
                    self._online.touch()
                if _NO_CONNECTION in line and not waiting:
                    waiting = True
                    _LOG.warning(
                        "%s does not answer, or its certificate is none that "
                        "root_certificates signed; trying on",
                        self._settings.superlink,
                    )
        child.wait()
        text = "\n".join(said)
        if child.returncode == 0:  # it said goodbye, or was told to go
            self._online.unlink(missing_ok=True)
        if all(mark in text for mark in _NOT_LET_IN):
            self.problem = NotLetIn(_not_let_in(self._settings))
            return False
        if child.returncode and not self._stop.is_set():
            _LOG.warning("the SuperNode ended with exit code %d:\n%s", child.returncode, text)
        return let_in


def alone(settings: Settings) -> AbstractContextManager[None]:
    """Hold a node.yaml's state folder for this process.

    Raises:
        AlreadyRunning: on entry, if another process has it.
    """
    taken = AlreadyRunning(
        f"{settings.name} runs already with the state in {settings.state}; stop it first, "
        "or give each node.yaml a state folder of its own"
    )
    return flower_program.held(settings.state / "node.lock", taken)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM and SIGINT; what does not end then within some seconds is ended.

    What is lost at any moment costs nobody's privacy: all is charged and kept before it is sent.
    """
    timers: list[threading.Timer] = []

    def heard(number: int, frame: FrameType | None) -> None:
        stop.set()
        if not timers:
            timers.append(threading.Timer(_PATIENCE_S, os._exit, (128 + number,)))
            timers[0].daemon = True
            timers[0].start()

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _program() -> list[str]:
    if find_spec("flwr") is None:
        raise NoFlower("there is no Flower beside this weft; install weft with its dependencies")
    # -P: nothing is imported from where somebody starts a node
    return [sys.executable, "-P", "-m", "clients.flower_supernode"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _not_let_in(settings: Settings) -> str:
    return (
        f"{settings.superlink} does not let {settings.name} in: its key is not registered there "
        "(yet), has expired, or was disabled. Send the coordinator's administrator the file that "
        "weft node join prints; when it is approved, start again"
    )
