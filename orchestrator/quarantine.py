"""Who is asked no more in a run because it failed too often, and how it is forgiven."""

from __future__ import annotations

from orchestrator.config import RunConfig
from orchestrator.history import History
from storage.ledger import Ledger


class NotAtFault(LookupError):
    """The client's last answer in the run was no failure."""


def quarantined(config: RunConfig, history: History) -> tuple[str, ...]:
    """Return who is asked no more: after so many faults in a row, until it is released."""
    limit = config.quarantine_after
    if limit is None:
        return ()
    return tuple(sorted(c for c, f in history.faults.items() if f.in_a_row >= limit))


def quarantined_in(ledger: Ledger, run: str) -> tuple[str, ...]:
    """Return who is quarantined in a run (by its id), sorted.

    Raises:
        UnknownRun: if there is no such run.
    """
    config = RunConfig.model_validate(ledger.run(run).config)
    return quarantined(config, _recent(ledger, run))


def release(ledger: Ledger, run: str, client: str) -> None:
    """Forget a client's faults in a run (by its id): from its next round on it may be asked.

    Works while the run goes on, too: it reads the event before it opens a round.

    Raises:
        UnknownRun: if there is no such run.
        NotAtFault: if there is nothing to forget.
    """
    faults = _recent(ledger, run).faults
    if client not in faults:
        known = f"; these have: {', '.join(sorted(faults))}" if faults else ""
        raise NotAtFault(f"{client!r} has no faults in run {run}{known}")
    ledger.record(run, "forgiven", {"client": client})


def _recent(ledger: Ledger, run: str) -> History:
    """Return a run's faults; reads only what happened since its last committed round.

    Raises:
        UnknownRun: if there is no such run.
    """
    last = ledger.last_event(run, "committed")
    # an older weft's commits say nothing of faults: its logs are read whole
    known = History.at_commit(last) if last and "faults" in last.data else History()
    for event in ledger.events(run, after=known.seq):
        # most events, by far, tell of clients that have no faults to forget
        if event.kind != "accepted" or event.data["client"] in known.faults:
            known = known.after(event)
    return known
