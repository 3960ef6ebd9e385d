"""Drives federations in forked processes that fail at the N-th boundary of a durable write.

A boundary is what a process does to a disk or a database: a file synced, renamed, removed, a folder
made, a statement that writes, a commit (before it and after it). The hooks are set in the child
only; weft has none. The parent has everything imported and the base model loaded, so that a child
is a fresh process after the milliseconds of a fork.

Reads jobs from standard input and answers each on standard output, one JSON object a line::

    {"home": ..., "config": {...}, "fail": "kill" | "full" | "outage" | null, "at": 17}
    {"home": ..., "stream": {...}, "fail": ..., "at": ...}
    {"signal": 9} or {"signal": 0, "version": ..., "error": ..., "boundaries": [...]}
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import stat
import sys
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

# what weft imports late is imported before the forks
import alembic.command
import alembic.script  # noqa: F401
import opacus.accountants  # noqa: F401
import peft  # noqa: F401
import torch
from sqlalchemy.engine.default import DefaultDialect

from clients import models
from orchestrator import cli, service
from orchestrator.config import RunConfig, parse_config
from orchestrator.coordinator import Driving
from orchestrator.stream import parse_stream
from orchestrator.streaming import run_stream

_FILE_CALLS = ("fsync", "link", "mkdir", "rename", "replace", "unlink")
_READS = ("SELECT", "PRAGMA", "BEGIN", "WITH")


class Boundaries:
    """Counts the boundaries that this process reaches, and fails at one of them.

    Args:
        fail: ``kill`` (SIGKILL), ``full`` (no space for this one), ``outage`` (the database fails
            from here on), or None to count only.
        at: at which boundary, from 1.
    """

    def __init__(self, fail: str | None, at: int) -> None:
        self.names: list[str] = []
        self._fail, self._at = fail, at
        self._main = threading.current_thread()

    def reach(self, name: str, handle: int | None = None, path: str | None = None) -> None:
        """Note a boundary; die or raise if this is the one, or if it lies behind it.

        Args:
            name: of the boundary.
            handle: a file that is being written: the crash leaves half of it.
            path: what the system's own error would name.
        """
        if threading.current_thread() is not self._main:
            return
        self.names.append(name)
        here = len(self.names)
        if self._fail == "kill" and here == self._at:
            _tear(handle)
            os.kill(os.getpid(), signal.SIGKILL)
        sql = name.startswith("sql")
        if self._fail == "full" and here == self._at:
            if sql:
                raise sqlite3.OperationalError("database or disk is full")
            if name != "file unlink":  # removing needs no space
                _tear(handle)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self._fail == "outage" and sql and here >= self._at:
            raise sqlite3.OperationalError("disk I/O error")

    def install(self) -> None:
        """Hook the calls by which Python writes to disks and databases."""
        for name in _FILE_CALLS:
            setattr(os, name, self._before(f"file {name}", getattr(os, name)))
        Path.write_text = self._torn(Path.write_text)  # type: ignore[method-assign]
        commit, execute = DefaultDialect.do_commit, DefaultDialect.do_execute

        def do_commit(dialect: Any, connection: Any) -> None:
            self.reach("sql commit")
            commit(dialect, connection)
            self.reach("sql committed")

        def do_execute(
            dialect: Any, cursor: Any, statement: str, parameters: Any, context: Any = None
        ) -> None:
            if not statement.lstrip().upper().startswith(_READS):
                self.reach("sql statement")
            execute(dialect, cursor, statement, parameters, context)

        DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
        DefaultDialect.do_execute = do_execute  # type: ignore[method-assign]

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            if name == "file fsync":
                self.reach(name, handle=args[0])
            elif name != "file mkdir" or not Path(args[0]).exists():
                self.reach(name, path=str(args[0]))
            return call(*args, **kwargs)

        return hooked

    def _torn(self, write: Callable[..., int]) -> Callable[..., int]:
        """A file that is not written durably has, at the crash, half of what was written."""

        @wraps(write)
        def hooked(path: Path, *args: Any, **kwargs: Any) -> int:
            done = write(path, *args, **kwargs)
            with path.open("r+b") as file:
                self.reach("file write", file.fileno(), str(path))
            return done

        return hooked


def _tear(handle: int | None) -> None:
    """Leave half of a file that was not synced yet: what a disk does to it."""
    if handle is not None and stat.S_ISREG(os.fstat(handle).st_mode):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)


def drive(home: Path, config: RunConfig) -> str:
    """Launch the run, or go on with it if it is on the ledger."""
    workspace = service.open_workspace(home)
    try:
        if records := workspace.ledger.runs():
            return service.resume(workspace, records[0].id)
        return service.launch(workspace, config)
    finally:
        workspace.close()


def drive_stream(home: Path, document: dict[str, Any]) -> str | None:
    """Do what ``weft stream run`` does with a stream's file; return what the last task ended with.

    Run again it goes on: there is no other command for that.
    """
    workspace = service.open_workspace(home)
    try:
        stream = parse_stream(document)
        found = run_stream(workspace, stream, Driving(), lambda run: lambda kind, data: None)
        return found[-1].result
    finally:
        workspace.close()


def work(job: dict[str, Any], answer: int) -> None:
    """Do one job and write its answer to a pipe."""
    boundaries = Boundaries(job.get("fail"), job.get("at", 0))
    boundaries.install()
    found: dict[str, Any] = {"signal": 0, "version": None, "error": None}
    try:
        home = Path(job["home"])
        if "stream" in job:
            found["version"] = drive_stream(home, job["stream"])
        else:
            found["version"] = drive(home, parse_config(job["config"]))
    except Exception as error:
        # what the command line would do with it: print a sentence, or a traceback
        found["error"] = str(error)
        found["expected"] = isinstance(error, cli._EXPECTED) and cli._is_expected(error)
        found["type"] = f"{type(error).__module__}.{type(error).__qualname__}"
    with os.fdopen(answer, "w") as pipe:
        json.dump({**found, "boundaries": boundaries.names}, pipe)


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a forked process and return its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(job, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    found: dict[str, Any] = json.loads(text)
    return found


def main() -> None:
    """Serve jobs until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if "warm" in job:
            models.load(parse_config(job["warm"]).model_spec())
            answer: dict[str, Any] = {}
        else:
            answer = in_a_process(job)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
