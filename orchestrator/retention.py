"""Which client updates are kept, for how long, and what is left of those that were withdrawn.

An accepted update lies under its run's folder, by round and client; its digest is in the lineage
for ever, whatever becomes of its bytes. Deleting is safe at any moment at which it is done here:
after a commit a run needs no update any more that it had taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clients.files import write_durably
from clients.wire import digest
from orchestrator.policy import Retention, Staleness
from storage.withdrawals import Withdrawal

_SUFFIX, _TOMB = ".safetensors", ".withdrawn.json"


def folder_of(home: Path, run: str) -> Path:
    """Return where a run's updates are."""
    return home / "runs" / run


def drop_after_round(
    folder: Path, retention: Retention, round_: int, stale: Staleness | None
) -> None:
    """Delete the updates that are not kept once ``round_`` is committed.

    Args:
        folder: the run's.
        retention: what is kept.
        round_: the newest committed round.
        stale: how old an update may be that is aggregated: one of the last rounds may be older.
    """
    if retention.keep == "none":
        _drop(folder, round_)
    elif retention.last is not None:
        _drop(folder, round_ - retention.last - (stale.max_staleness if stale else 0))


def drop_after_close(
    folder: Path, config: Mapping[str, Any], withdrawn: Iterable[Withdrawal]
) -> None:
    """Delete the updates that are not kept once the run is closed: completed or cancelled.

    Args:
        folder: the run's.
        config: the run's, JSON; one of before there was a retention has the default.
        withdrawn: whose updates are buried, however long they would be kept.
    """
    bury(folder, withdrawn)
    if Retention.model_validate(config.get("retention", {})).keep in ("none", "until-closed"):
        _drop(folder, None)


def bury(folder: Path, withdrawn: Iterable[Withdrawal]) -> int:
    """Put a tombstone in the place of each update of who withdrew, and return how many there were.

    Args:
        folder: the run's.
        withdrawn: who withdrew.
    """
    count = 0
    for one in withdrawn:
        facts = {"client": one.client, "who": one.who, "why": one.why}
        for path in sorted(folder.glob(f"round-*/{one.client}{_SUFFIX}")):
            when = one.created_at.isoformat()
            document = {**facts, "withdrawn_at": when, "digest": digest(path.read_bytes())}
            text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
            write_durably(path.with_name(one.client + _TOMB), f"{text}\n".encode())
            path.unlink(missing_ok=True)
            count += 1
    return count


def is_buried(home: Path, client: str, sha256: str) -> bool:
    """Return whether a tombstone says that an update was withdrawn."""
    tombs = home.glob(f"runs/*/round-*/{client}{_TOMB}")
    return any(json.loads(tomb.read_text("utf-8"))["digest"] == sha256 for tomb in tombs)


def kept_update(home: Path, client: str, round_: int, sha256: str) -> bytes | None:
    """Return an accepted update's bytes, from whichever run has them, or None.

    Args:
        home: the workspace's folder.
        client: who sent it.
        round_: the round it was asked in.
        sha256: its digest in the lineage; bytes of another are not it.
    """
    for path in sorted(home.glob(f"runs/*/round-{round_}/{client}{_SUFFIX}")):
        data = path.read_bytes()
        if digest(data) == sha256:
            return data
    return None


def _drop(folder: Path, until: int | None) -> None:
    """Delete the updates that were asked for in rounds up to ``until``; None is all of them."""
    for place in folder.glob("round-*"):
        if until is None or int(place.name.removeprefix("round-")) <= until:
            for path in place.glob(f"*{_SUFFIX}"):
                path.unlink(missing_ok=True)
            if not any(place.iterdir()):
                place.rmdir()
