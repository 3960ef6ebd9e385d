"""Flower's own programs as children of ours: a node's SuperNode, a home's SuperLink."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Without them Flower tells its maker of every start, and installs what a run asks for."""

# A child that outlived this process would go on, and nobody would answer for it.
WITH_PARENT = (
    "import ctypes, os, sys; parent = int(sys.argv[1])\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 15)\n"
    "if os.getppid() == parent: os.execv(sys.argv[2], sys.argv[2:])"
)


def path_of(program: str) -> Path:
    """Return where a program is that was installed beside this Python.

    Raises:
        FileNotFoundError: if it is not there.
    """
    found = Path(sysconfig.get_path("scripts")) / program
    if not found.is_file():
        raise FileNotFoundError(f"there is no {found}; install weft with its dependencies")
    return found


def bound(command: list[str]) -> list[str]:
    """Return a command that ends with this process, however that ends."""
    return [sys.executable, "-c", WITH_PARENT, str(os.getpid()), *command]


def environment(home: Path) -> dict[str, str]:
    """Return this process' environment with Flower's switches, and its home, which is made."""
    home.mkdir(mode=0o700, exist_ok=True)
    return {**os.environ, **SWITCHES, "FLWR_HOME": str(home)}


def end(child: subprocess.Popen[Any], grace_s: float) -> None:
    """End a child, which may take so long to say goodbye."""
    child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextmanager
def held(file: Path, taken: Exception) -> Iterator[None]:
    """Hold a file for this process, in a folder for its user alone, which is made.

    Args:
        file: that nobody else may hold meanwhile.
        taken: raised if another process does.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield
