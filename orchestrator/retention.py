"""Which client updates are kept, and for how long.

An accepted update lies in its run's folder, by round and client, until the version that is made of
it is on the run's log. By then what is kept is in the store (:mod:`storage.updates`), and the
folder is emptied: a run needs nothing again that it has aggregated. An update's digest is in the
lineage for ever, whatever becomes of its bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.wire import digest
from orchestrator.acceptance import Accepted
from orchestrator.policy import Retention
from orchestrator.replay import asked_round
from orchestrator.workspace import Workspace
from storage.store import AdapterStore
from storage.updates import Leaf

_SUFFIX, _TOMB = ".safetensors", ".withdrawn.json"


def folder_of(home: Path, run: str) -> Path:
    """Return where a run's updates are while it needs them."""
    return home / "runs" / run


def keep_round(
    store: AdapterStore, run: str, version: str, round_: int, accepted: Sequence[Accepted]
) -> None:
    """Keep the updates of a version that was just committed, as blobs of the store.

    Args:
        store: where.
        run: the run's id.
        version: the version's id.
        round_: its round.
        accepted: what it was aggregated from.

    Raises:
        OSError, BlobsUnavailable: if they cannot be stored.
    """
    leaves = [Leaf(one.leaf["client"], one.leaf["digest"], one.path) for one in accepted]
    store.updates.keep(run, version, round_, leaves)


def drop_after_round(
    store: AdapterStore, run: str, folder: Path, retention: Retention, round_: int
) -> None:
    """Delete what is not kept once a round's version is on the log.

    Args:
        store: where updates are kept.
        run: the run's id.
        folder: the run's.
        retention: what is kept.
        round_: the round.
    """
    _empty(folder)
    if retention.last is not None:
        store.updates.drop(run, round_ - retention.last)


def drop_after_close(
    store: AdapterStore, run: str, folder: Path, config: Mapping[str, Any]
) -> None:
    """Delete what is not kept once a run is closed: completed or cancelled.

    Args:
        store: where updates are kept.
        run: the run's id.
        folder: the run's.
        config: the run's, JSON; one of before there was a retention has the default.
    """
    _empty(folder)
    if Retention.model_validate(config.get("retention", {})).keep in ("none", "until-closed"):
        store.updates.drop(run)


def bury_waiting(folder: Path, clients: Collection[str]) -> int:
    """Delete the updates of clients that a run has not aggregated; return how many those were."""
    found = [path for client in clients for path in folder.glob(f"round-*/{client}{_SUFFIX}")]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


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
        path, tomb = (there / f"{leaf['client']}{suffix}" for suffix in (_SUFFIX, _TOMB))
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


def _empty(folder: Path) -> None:
    """Delete the updates that wait to be aggregated."""
    for place in folder.glob("round-*"):
        for path in place.glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)
        if not any(place.iterdir()):
            place.rmdir()
