"""The end of a run: its keys are destroyed, so that nobody can ever compute its noise again.

A run is closed when it is completed or cancelled. One that is paused, or failed, or whose driver
died, can be resumed, and keeps its keys: an assignment that was sent must not be answered under
another one. One that is closed and then extended draws new keys, and its new rounds are spends of
their own; what its clients have sent stays known to them, and is sent again where it is asked for.

First the end is on the log, then the keys go. In between a note in the home stands for what is left
to do; whoever works with the home next does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clients.files import sync
from clients.keys import destroy_key
from orchestrator.retention import COORDINATOR, coordinator_keys
from storage.ledger import Ledger
from storage.records import Status

CLOSED: frozenset[Status] = frozenset({"completed", "cancelled"})
"""Of a run that can be extended or cloned, and not resumed."""


def begin_closing(home: Path, run: str, config: Mapping[str, Any]) -> None:
    """Note that a run's keys are to be destroyed; before its end is on the log.

    Args:
        home: where its clients and its coordinator keep theirs.
        run: the run's id.
        config: the run's, JSON; one without keys needs no note.
    """
    privacy = config.get("privacy")
    if privacy and privacy.get("insecure_seed") is None:
        notes = _notes(home)
        notes.mkdir(mode=0o700, exist_ok=True)
        (notes / run).touch(mode=0o600)
        sync(notes)


def finish_closing(home: Path, ledger: Ledger) -> None:
    """Destroy the keys of the runs that are noted and closed; one that goes on keeps its own.

    Args:
        home: where keys are.
        ledger: what says where a run stands. A run that it does not know is another one's.
    """
    for note in sorted(_notes(home).glob("*")):
        with suppress(LookupError):
            if ledger.run(note.name).status in CLOSED:
                _destroy_keys(home, ledger, note.name)
                note.unlink(missing_ok=True)
                sync(note.parent)


def _destroy_keys(home: Path, ledger: Ledger, run: str) -> None:
    for client in sorted({row.client for row in ledger.spends_of_run(run)}):
        destroy_key(home / "sites", run, client)  # drawn after the spend, never before
    destroy_key(coordinator_keys(home), run, COORDINATOR)


def _notes(home: Path) -> Path:
    return home / "closing"
