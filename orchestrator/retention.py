"""Which client updates are kept, and for how long.

An accepted update lies in its run's folder, by round and client, until the version that is made of
it is on the run's log. By then what is kept is in the store (:mod:`storage.updates`), and the
folder is emptied: a run needs nothing again that it has aggregated. An update's digest is in the
lineage for ever, whatever becomes of its bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.policy import Retention
from storage.store import AdapterStore
from storage.updates import Leaf

if TYPE_CHECKING:  # accepting takes torch, keeping does not
    from orchestrator.acceptance import Accepted

SUFFIX = ".safetensors"
COORDINATOR = ""
"""Whose key it is that hides a sum of updates; no client has this name."""


def folder_of(home: Path, run: str) -> Path:
    """Return where a run's updates are while it needs them."""
    return home / "runs" / run


def coordinator_keys(home: Path) -> Path:
    """Return where the coordinator's own keys are, one a run with client-level DP."""
    return home / "central"


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


def drop_after_close(store: AdapterStore, run: str, home: Path, config: Mapping[str, Any]) -> None:
    """Delete the updates that are not kept once a run is closed, completed or cancelled.

    Args:
        store: where updates are kept.
        run: the run's id.
        home: where its folder is.
        config: the run's, JSON; one of before there was a retention has the default.
    """
    _empty(folder_of(home, run))
    if Retention.model_validate(config.get("retention", {})).keep in ("none", "until-closed"):
        store.updates.drop(run)


def bury_waiting(folder: Path, clients: Collection[str]) -> int:
    """Delete the updates of clients that a run has not aggregated; return how many those were."""
    found = [path for client in clients for path in folder.glob(f"round-*/{client}{SUFFIX}")]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _empty(folder: Path) -> None:
    """Delete the updates that wait to be aggregated."""
    for place in folder.glob("round-*"):
        for path in place.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)
        if not any(place.iterdir()):
            place.rmdir()
