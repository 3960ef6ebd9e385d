"""What people see of a run as it goes on: its log, and its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from orchestrator.history import History
from orchestrator.policy import TRAIN_LOSS
from orchestrator.workspace import Workspace
from storage.ledger import Event, Ledger, RunRecord
from storage.records import FINAL

_PAGE = 1000
_POLL_S = 0.5


class WaitedTooLong(RuntimeError):
    """A run did not end in the time that was given."""


def log(
    workspace: Workspace, ref: str, follow: bool = False, poll_s: float = _POLL_S
) -> Iterator[Event]:
    """Yield a run's events in order; with ``follow`` also those to come, until the run has ended.

    Args:
        workspace: where.
        ref: the run.
        follow: whether to wait for more.
        poll_s: seconds between looks, > 0.

    Raises:
        UnknownRun: if there is no such run.
    """
    ledger, after = workspace.ledger, 0
    run = ledger.run(ref).id
    while True:
        # looked at before the events: what is written before the end is read after it
        ended = not follow or ledger.run(run).status in FINAL
        page = ledger.events(run, after, _PAGE)
        yield from page
        after = page[-1].seq if page else after
        if len(page) == _PAGE:
            continue
        if ended:
            return
        time.sleep(poll_s)


def losses(ledger: Ledger, run: str) -> dict[int, float]:
    """Return what the clients of each round said of their loss, on average; in DP's noise, if any.

    Of a run whose clients tell nothing of it: nothing.
    """
    told = History().after_all(ledger.events(run)).told
    return {one.round: one.metrics[TRAIN_LOSS] for one in told}


def wait(
    workspace: Workspace,
    refs: Sequence[str],
    timeout_s: float | None = None,
    poll_s: float = _POLL_S,
) -> list[RunRecord]:
    """Wait until all of ``refs`` have ended and return their records.

    Args:
        workspace: where.
        refs: runs.
        timeout_s: seconds at most; None for no limit.
        poll_s: seconds between looks, > 0.

    Raises:
        UnknownRun: if there is no such run.
        WaitedTooLong: if one has not ended in time.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    runs = [workspace.ledger.run(ref).id for ref in refs]
    while True:
        found = [workspace.ledger.run(run) for run in runs]
        going = [record for record in found if record.status not in FINAL]
        if not going:
            return found
        if end is not None and time.monotonic() >= end:
            stands = ", ".join(f"{r.id} is {r.status}" for r in going)
            raise WaitedTooLong(f"after {timeout_s:g} s {stands}; wait longer, or see: weft runs")
        time.sleep(poll_s)
