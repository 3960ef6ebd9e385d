"""Where a run stands, from its events alone: pure functions.

A run's row is this projection, kept beside the log so that a list of runs reads no logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from storage.records import FINAL, Event

PROJECTED = (
    "status",
    "version",
    "round",
    "rounds",
    "error",
    "started_at",
    "finished_at",
    "priority",
    "labels",
    "owner",
    "token",
    "wanted",
)
"""What of a run its events decide. The rest is what was asked for, and the lease."""

_FIRST: Mapping[str, Any] = {
    "status": "queued",
    "version": None,
    "round": 0,
    "rounds": 0,
    "error": None,
    "started_at": None,
    "finished_at": None,
    "priority": 0,
    "labels": {},
    "owner": None,
    "token": 0,
    "wanted": "run",
}
_TIMES = ("started_at", "finished_at")


def applied(
    standing: Mapping[str, Any], changes: Mapping[str, Any], at: datetime
) -> dict[str, Any]:
    """Return where a run stands after an event.

    A new status clears the error unless it brings one. The first ``running`` sets ``started_at``;
    a final status sets ``finished_at``, any other clears it, as when a failed run is resumed. Only
    a running run has an owner, and a wish is fulfilled when the run neither runs nor waits to.

    Args:
        standing: where it stood, by the names of ``PROJECTED``.
        changes: what the event says, of the same names; times as ISO 8601 or as they are.
        at: when it happened.
    """
    after = {**standing, **changes}
    for name in _TIMES:
        if isinstance(after[name], str):
            after[name] = datetime.fromisoformat(after[name])
    if "status" not in changes:
        return after
    status = after["status"]
    after["error"] = changes.get("error")
    if status == "running":
        after["started_at"] = after["started_at"] or at
    else:
        after["owner"] = None
    if "finished_at" not in changes:
        after["finished_at"] = at if status in FINAL else None
    if status not in ("running", "queued"):
        after["wanted"] = "run"
    return after


def project(events: Iterable[Event]) -> dict[str, Any]:
    """Return where a run stands after ``events``, all of its log in order."""
    standing = dict(_FIRST)
    for event in events:
        standing = applied(standing, event.changes, event.at)
    return standing
