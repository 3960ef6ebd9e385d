"""A driver's hold on a run: the name it goes by, and the thread that keeps its lease."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from storage.database import DatabaseUnavailable
from storage.ledger import LeaseLost, RunQueue

_LOG = logging.getLogger(__name__)
_PROC = Path("/proc")


def driver_name() -> str:
    """Return the name of this process as a driver: host, process id, and what makes them unique."""
    pid = os.getpid()
    return f"{socket.gethostname()}:{pid}:{_host()}:{_birth(pid)}"


def is_dead(owner: str) -> bool:
    """Return whether a driver was a process of this host and is gone.

    False where that cannot be told: on another host, or in another container.
    """
    _, pid, host, birth = ("::::" + owner).rsplit(":", 3)
    return host == _host() and pid.isdecimal() and _birth(int(pid)) != birth


@cache
def _host() -> str:
    """Return what this host's process ids belong to: name, boot, and namespace of processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text("ascii"))
        parts.append(str((_PROC / "self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _birth(pid: int) -> str:
    """Return what tells a process from a later one of its id; ``gone`` if there is none."""
    try:
        # after the command's name, which may hold anything: the state, and 19 fields on the start
        fields = (
            (_PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        )
        return "gone" if fields[0] in "ZX" else fields[19]
    except OSError:
        if _PROC.joinpath("self/stat").exists():
            return "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "alive"


@dataclass(slots=True)
class Lease:
    """Keeps the lease on a claimed run while it is entered, from a thread.

    A lease that is lost ends the thread and nothing else: the run's next event is refused, which
    stops its driver.

    Attributes:
        queue: of the ledger.
        run: the run's full id.
        token: what its claim gave.
        lease_s: seconds that a lease lasts, > 0; it is renewed three times in that.
    """

    queue: RunQueue
    run: str
    token: int
    lease_s: float
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> Lease:
        self._thread = threading.Thread(target=self._keep, name=f"lease {self.run}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ended.wait(self.lease_s / 3):
            try:
                self.queue.renew(self.run, self.token, self.lease_s)
            except LeaseLost:
                return
            except (DatabaseUnavailable, SQLAlchemyError) as error:
                # the database, or a connection to it, may be there again before the lease is over
                _LOG.warning("the lease on run %s was not renewed: %s", self.run, error.args[0])
