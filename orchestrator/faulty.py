"""Makes faults happen: around workers, backend, blobs and database, none of which knows of it.

Only a run whose config has ``faults`` is wrapped; see :mod:`orchestrator.faults` for what happens.
A fault of the coordinator happens once in a run: a file remembers it, and a resumed run goes on.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import event
from torch import Tensor

from clients import pace
from clients.assignment import Assignment
from clients.evaluate import Evaluation
from orchestrator.backends.base import (
    TICK_S,
    Backend,
    Failure,
    Perform,
    Result,
    Started,
    Stepped,
    unheard,
)
from orchestrator.faults import Faults, HostFault, client_fault, host_fault, is_faulty
from orchestrator.plan import Plan
from orchestrator.workspace import Workspace
from storage.blobs import BlobStore, name_of
from storage.database import DatabaseUnavailable
from storage.ledger import Ledger
from storage.store import AdapterStore
from strategies.base import Update

_JUMP = timedelta(hours=1)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}")
"""How SQLite's dialect writes a time."""

Note = Callable[[str, Mapping[str, Any]], None]


def faulted(
    workspace: Workspace, plan: Plan, backend: Backend, note: Note
) -> tuple[Workspace, Backend]:
    """Return the workspace and the backend of a run, with what its ``faults`` do to them.

    Workers are not wrapped here: they must perform with :class:`FaultyPerform`.

    Args:
        workspace: of the run.
        plan: the run's plan; its config has ``faults``.
        backend: where clients train.
        note: called with ``fault`` and what happens to whom, before it does.
    """
    faults = plan.config.faults
    assert faults is not None
    host = Host(faults, workspace.home / "runs" / plan.run / "faults", note)
    engine = workspace.engine.execution_options()  # the same connections, listeners of its own
    event.listen(engine, "before_cursor_execute", host.on_statement, retval=True)
    store = AdapterStore(engine, FaultyBlobs(workspace.blobs, host))
    troubled = replace(workspace, store=store, ledger=Ledger(engine), engine=engine)
    return troubled, FaultyBackend(backend, faults, host, note)


@dataclass(frozen=True, slots=True)
class FaultyPerform:
    """Performs an assignment as the client that ``faults`` makes of its own; picklable.

    Attributes:
        faults: the config's section.
        perform: what an honest client does.
    """

    faults: Faults
    perform: Perform

    def __call__(self, assignment: Assignment, stepped: pace.Stepped) -> Update | Evaluation:
        """Do what the assignment asks for, or what the fault does instead."""
        if assignment.action != "train":
            return self.perform(assignment, stepped)
        kind = client_fault(self.faults, assignment.round, assignment.client)
        if kind == "crash":
            os._exit(1)
        while kind == "hang":
            time.sleep(TICK_S)
        if kind == "slow":
            time.sleep(self.faults.delay_s)
        result = self.perform(assignment, stepped)
        if kind not in ("nan", "wrong-shape") or isinstance(result, Evaluation):
            return result
        name = min(n for n, t in result.tensors.items() if t.is_floating_point() and t.numel())
        tensor = result.tensors[name]
        wrong = _with_nan(tensor) if kind == "nan" else tensor.unsqueeze(0)
        return replace(result, tensors={**result.tensors, name: wrong})


@dataclass(slots=True)
class Host:
    """The coordinator's own troubles.

    Attributes:
        faults: the config's section.
        done: folder that remembers what has happened.
        note: called before something happens.
        round: which is going on; 0 before the first.
    """

    faults: Faults
    done: Path
    note: Note
    round: int = 0

    def due(self, kind: HostFault) -> bool:
        """Return whether it is time for ``kind``; the answer is yes once a round."""
        if host_fault(self.faults, self.round) != kind:
            return False
        mark = self.done / f"{kind}-{self.round}"
        if mark.exists():
            return False
        self.done.mkdir(parents=True, exist_ok=True)
        mark.touch()
        self.note("fault", {"round": self.round, "kind": kind})
        return True

    def on_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any
    ) -> tuple[str, Any]:
        """Fail a statement, or let it say another time than it is."""
        if self.due("database-outage"):
            raise DatabaseUnavailable(
                f"the store failed: the database outage that faults ask for in round {self.round}; "
                "what was being written is undone, and the run can be resumed"
            )
        if host_fault(self.faults, self.round) == "clock-jump":
            ahead = random.Random(f"{self.faults.seed}/{self.round}/clock").choice((-1, 1))
            return statement, _moved(parameters, ahead * _JUMP)
        return statement, parameters


class FaultyBlobs(BlobStore):
    """Blobs on a disk that is full, or that does not keep what it was given."""

    def __init__(self, blobs: BlobStore, host: Host) -> None:
        super().__init__(blobs.place, blobs.cache)
        self._host = host

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Store ``tensors``; see :class:`storage.blobs.BlobStore`.

        Raises:
            OSError: if the disk is full.
        """
        if self._host.due("full-disk"):
            where = self.place.where(name_of(self.digest(tensors)))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        digest = super().put(tensors)
        if self._host.due("corrupt-blob"):
            data = bytearray(self.fetch(digest))
            data[-1] ^= 1
            self.place.write(name_of(digest), bytes(data))
        return digest


@dataclass(slots=True)
class FaultyBackend:
    """A backend on a line that loses results, doubles them, or brings an old one.

    Attributes:
        backend: where clients really train.
        faults: the config's section.
        host: is told which round is going on.
        note: called with each client's fault when its assignment is taken.
    """

    backend: Backend
    faults: Faults
    host: Host
    note: Note
    _known: dict[str, dict[int, Update]] = field(default_factory=dict, init=False)
    """Of those who replay: by round, the last two updates."""
    _away: list[Result] = field(default_factory=list, init=False)

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield results; of a lost one nothing comes but ticks, and who is away fails at once."""
        lost = False
        with closing(self.backend.run(self._noted(assignments), started, stepped)) as results:
            for result in results:
                yield from self._of_the_away()
                if not isinstance(result, Update) or not result.client:
                    yield result
                    continue
                kind = client_fault(self.faults, result.round, result.client)
                lost = lost or kind == "drop"
                yield None if kind == "drop" else self._sent(result, kind)
                if kind == "duplicate":
                    yield result
        yield from self._of_the_away()
        while lost:  # nobody has answered for it yet
            time.sleep(TICK_S)
            yield None

    def close(self) -> None:
        """Give workers back."""
        self.backend.close()

    def _noted(self, assignments: Iterable[Assignment | None]) -> Generator[Assignment | None]:
        for assignment in assignments:
            if assignment is not None and assignment.action == "train":
                self.host.round = assignment.round
                kind = client_fault(self.faults, assignment.round, assignment.client)
                if kind is not None:
                    facts = {"round": assignment.round, "client": assignment.client, "kind": kind}
                    self.note("fault", facts)
                if kind == "away":
                    reason = f"{assignment.client} is not there in round {assignment.round}"
                    self._away.append(Failure(assignment.client, assignment.round, reason))
                    continue
            yield assignment

    def _of_the_away(self) -> Generator[Result]:
        while self._away:
            yield self._away.pop(0)

    def _sent(self, update: Update, kind: str | None) -> Update:
        """Return what arrives: the update, or for ``replay`` the one before, if it is known."""
        section, client = self.faults, update.client
        listed = any((f.kind, f.client) == ("replay", client) for f in section.at)
        if not listed and not ("replay" in section.kinds and is_faulty(section, client)):
            return update  # and nothing is kept of who never replays
        known = self._known.setdefault(client, {})
        earlier = max((round_ for round_ in known if round_ < update.round), default=None)
        self._known[client] = {r: u for r, u in known.items() if r == earlier}
        self._known[client][update.round] = update
        if kind != "replay":
            return update
        return replace(update, round=update.round - 1) if earlier is None else known[earlier]


def _with_nan(tensor: Tensor) -> Tensor:
    wrong = tensor.clone()
    wrong.reshape(-1)[0] = torch.nan
    return wrong


def _moved(value: Any, jump: timedelta) -> Any:
    """Return a statement's parameters with every time in them moved."""
    if isinstance(value, datetime):
        return value + jump
    if isinstance(value, str) and _MOMENT.fullmatch(value):
        return (datetime.fromisoformat(value) + jump).isoformat(" ", "microseconds")
    if isinstance(value, Mapping):
        return {key: _moved(inner, jump) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(inner, jump) for inner in value)
    return value
