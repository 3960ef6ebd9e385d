"""What people do to a run that exists: pause, resume, cancel, extend, clone.

A decision is made on what the run's record says and written only if nothing has happened to the run
since; otherwise it is made again. So no command undoes what it did not see.
"""

from __future__ import annotations

import getpass
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from clients.seeds import seed_for
from orchestrator.closing import begin_closing, finish_closing
from orchestrator.cohort import draw, quorum, roster
from orchestrator.config import RunConfig, parse_config
from orchestrator.plan import Plan
from orchestrator.retention import drop_after_close
from orchestrator.score_rules import is_of_scores, most_scores
from orchestrator.workspace import Workspace
from storage.ledger import Ledger, RunChanged, RunFields, RunRecord

Decision: TypeAlias = tuple[str, dict[str, Any], RunFields] | None
"""An event's kind, facts and changes; None where the run stands as it should."""


class RunRefused(ValueError):
    """What is asked of a run is impossible as it stands."""


def pause(workspace: Workspace, ref: str) -> RunRecord:
    """Pause a run: at once while it waits, at its next event while it is driven.

    Raises:
        UnknownRun: if there is no such run.
        RunRefused: if it has ended.
    """
    return _steer(workspace, ref, _pause)


def cancel(workspace: Workspace, ref: str) -> RunRecord:
    """Cancel a run, for good: at once while it waits, at its next event while it is driven.

    One that failed is cancelled too: it will not be resumed, and its keys are destroyed.

    Raises:
        UnknownRun: if there is no such run.
        RunRefused: if it is completed.
    """
    before = workspace.ledger.run(ref)
    begin_closing(workspace.home, before.id, before.config)
    record = _steer(workspace, before.id, _cancel)
    if record.status == "cancelled":
        drop_after_close(workspace.store, record.id, workspace.home, record.config)
    finish_closing(workspace.home, workspace.ledger)
    return record


def requeue(workspace: Workspace, ref: str) -> RunRecord:
    """Put a paused or failed run back into the queue, or take a wish to pause back.

    Raises:
        UnknownRun: if there is no such run.
        RunRefused: if it is completed or cancelled.
    """
    return _steer(workspace, ref, _requeue)


def extend(workspace: Workspace, ref: str, rounds: str) -> RunRecord:
    """Give a run more rounds; one that has ended goes on from its last version.

    Under DP the noise was calibrated for the rounds that were planned. More rounds are refused
    where they would spend more than the run's ε; they are allowed where ``max_participations``
    keeps every client within what its noise was calibrated for, and where the noise itself was
    given: then ε grows with each round, and the ledger refuses what a budget does not allow.

    Args:
        workspace: where.
        ref: the run.
        rounds: ``+10`` for so many more, ``40`` for so many in all.

    Raises:
        UnknownRun: if there is no such run.
        RunRefused: if it is being driven, cancelled, or cannot have as many rounds.
    """
    if re.fullmatch(r"\+?[1-9]\d{0,8}", rounds) is None:
        raise RunRefused(
            f"rounds must be a number such as +10 (more) or 40 (in all), got {rounds!r}"
        )

    def decide(record: RunRecord, driven: bool) -> Decision:
        if driven:
            raise RunRefused(
                f"run {record.id} is being driven; pause it first with: weft runs pause {record.id}"
            )
        if record.status == "cancelled":
            raise RunRefused(f"run {record.id} is cancelled; clone it: weft runs clone {record.id}")
        total = int(rounds) + (record.rounds if rounds.startswith("+") else 0)
        if total <= record.rounds:
            raise RunRefused(
                f"run {record.id} has {record.rounds} rounds already, and {total} are not more"
            )
        _refuse_own_memory(workspace, record)
        _refuse_more_privacy(workspace.ledger, record, total)
        facts = {"rounds": total, "before": record.rounds, "by": getpass.getuser()}
        fields: RunFields = {"rounds": total}
        if record.status not in ("queued", "paused"):
            fields["status"] = "queued"
        return "extended", facts, fields

    finish_closing(workspace.home, workspace.ledger)  # its keys go before it can go on
    return _steer(workspace, ref, decide)


def clone(workspace: Workspace, ref: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return a run's config with changes, for a new run.

    Args:
        workspace: where.
        ref: the run.
        overrides: ``path.to.key=value``, as for the file that the run came from.

    Raises:
        UnknownRun: if there is no such run.
        BadConfig: if the changes make no sense.
    """
    return parse_config(document_of(workspace.ledger.run(ref)), overrides)


def document_of(record: RunRecord) -> dict[str, Any]:
    """Return a run's config as a file would have it."""
    document = dict(record.config)
    for kind in ("adapter", "strategy", "optimizer"):  # {name, options} on record, flat in a file
        document[kind] = {"name": document[kind]["name"], **document[kind]["options"]}
    return document


def _steer(
    workspace: Workspace, ref: str, decide: Callable[[RunRecord, bool], Decision]
) -> RunRecord:
    """Record what ``decide(record, driven)`` says of a run as it is now, and return its record."""
    ledger = workspace.ledger
    record = ledger.run(ref)
    while True:
        decision = decide(record, ledger.queue.is_driven(record.id))
        if decision is None:
            return record
        kind, facts, fields = decision
        try:
            ledger.record(record.id, kind, facts, after=record.seq, **fields)
            return ledger.run(record.id)
        except RunChanged:
            record = ledger.run(record.id)


def _pause(record: RunRecord, driven: bool) -> Decision:
    if record.status == "paused" or (driven and record.wanted == "pause"):
        return None
    if driven:
        return "wanted", _by(wanted="pause"), {"wanted": "pause"}
    if record.status not in ("queued", "running"):
        raise RunRefused(f"run {record.id} is {record.status}; only one that goes on can be paused")
    return "paused", _by(), {"status": "paused"}


def _cancel(record: RunRecord, driven: bool) -> Decision:
    if record.status == "cancelled" or (driven and record.wanted == "cancel"):
        return None
    if driven:
        return "wanted", _by(wanted="cancel"), {"wanted": "cancel"}
    if record.status == "completed":
        raise RunRefused(f"run {record.id} is completed already; there is nothing to cancel")
    return "cancelled", _by(), {"status": "cancelled"}


def _requeue(record: RunRecord, driven: bool) -> Decision:
    if record.status == "completed":
        more = f"weft runs extend {record.id} --rounds +10"
        raise RunRefused(f"run {record.id} is completed; for more rounds: {more}")
    if record.status == "cancelled":
        raise RunRefused(f"run {record.id} is cancelled; clone it: weft runs clone {record.id}")
    if record.status in ("paused", "failed"):
        return "queued", _by(), {"status": "queued", "wanted": "run"}
    if record.wanted != "run":
        return "wanted", _by(wanted="run"), {"wanted": "run"}
    return None


def _by(**facts: Any) -> dict[str, Any]:
    return {**facts, "by": getpass.getuser()}


def _refuse_own_memory(workspace: Workspace, record: RunRecord) -> None:
    """Refuse to train on against a memory that holds the very task that is being trained."""
    if record.version is None:
        return
    version = workspace.store.version(record.version)
    before = {workspace.store.version(parent.id).memory for parent in version.parents}
    if before and version.memory not in before:
        raise RunRefused(
            f"run {record.id} put its task into its memory when it ended, and more rounds would "
            "train against it; start a new run with start: continue or start: stack, or clone it: "
            f"weft runs clone {record.id} --set rounds=N"
        )


def _refuse_more_privacy(ledger: Ledger, record: RunRecord, total: int) -> None:
    """Refuse rounds for which the noise was not calibrated."""
    plan = Plan.from_json(ledger.plan(record.id))
    config, privacy = plan.config, plan.config.privacy
    again = f"its noise is calibrated anew by: weft runs clone {record.id} --set rounds={total}"
    asked, rows = config.evaluate, ledger.spends_of_run(record.id)
    often = most_scores(plan, rows, record.round, total)
    if asked is not None and often > asked.times(config.rounds):
        raise RunRefused(
            f"run {record.id} has the noise with which clients tell scores "
            f"{asked.times(config.rounds)} times for ε = {asked.epsilon:g}, and {total} rounds "
            f"would ask more often; {again}"
        )
    if privacy is None or privacy.epsilon is None:
        return
    if privacy.max_participations is None or privacy.max_participations > config.rounds:
        raise RunRefused(
            f"run {record.id} has the noise with which {config.rounds} rounds spend ε = "
            f"{privacy.epsilon:g} (δ = {privacy.delta:g}); more would spend more. Only a run whose "
            f"privacy.max_participations is at most its rounds has room for others; {again}"
        )
    spent = {(row.client, row.round) for row in rows if not is_of_scores(row, plan)}
    taken = Counter(client for client, round_ in spent if round_ <= record.round)
    known = roster(plan.participants, config.cohort)
    size, needed = config.cohort.to_ask(len(known.names)), quorum(config, len(known.names))
    for round_ in range(record.round + 1, total + 1):
        done = [name for name, times in taken.items() if times >= privacy.max_participations]
        cohort = draw(known, size, seed_for(config.seed, round_, "cohort"), done)
        if len(cohort) < needed:
            raise RunRefused(
                f"run {record.id} can have {round_ - 1} rounds at most: then every client has "
                f"taken part in {privacy.max_participations} (privacy.max_participations), for "
                f"which its noise was calibrated; {again}"
            )
        taken.update(cohort)
