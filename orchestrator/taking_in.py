"""What an older weft kept of client updates in folders of runs, taken into the store."""

from __future__ import annotations

from pathlib import Path

from clients.wire import digest
from orchestrator.replay import asked_round
from orchestrator.retention import SUFFIX, folder_of
from orchestrator.workspace import Workspace
from storage.updates import Leaf

_TOMB = ".withdrawn.json"


def take_in(workspace: Workspace) -> int:
    """Keep in the store what an older weft kept in folders of runs; return how many updates.

    Whatever is there of versions on a run's log is taken in, tombstones too. It can be cut short
    and done again.

    Raises:
        OSError, BlobsUnavailable: if they cannot be stored.
    """
    count = 0
    for record in workspace.ledger.runs(limit=1_000_000):
        folder = folder_of(workspace.home, record.id)
        if any(folder.glob("round-*/*")):
            for event in workspace.ledger.events(record.id):
                if event.kind == "committed":
                    facts = event.data["version"], event.data["round"]
                    count += _take_in(workspace, record.id, folder, *facts)
    return count


def _take_in(workspace: Workspace, run: str, folder: Path, version: str, round_: int) -> int:
    """Keep a version's updates that lie in its run's folder."""
    leaves, old = [], []
    for leaf in workspace.store.version(version).recipe["updates"]:
        there = folder / f"round-{asked_round(workspace, leaf)}"
        path, tomb = (there / f"{leaf['client']}{suffix}" for suffix in (SUFFIX, _TOMB))
        is_it = path.exists() and digest(path.read_bytes()) == leaf["digest"]
        if is_it or tomb.exists():
            leaves.append(Leaf(leaf["client"], leaf["digest"], path))
            old += [path, tomb]
    workspace.store.updates.keep(run, version, round_, leaves)
    for path in old:
        path.unlink(missing_ok=True)
    for place in {path.parent for path in old}:
        if not any(place.iterdir()):
            place.rmdir()
    return len(leaves)
