"""The run that a version is trained on in where it forgot: on past tasks beside its last one.

It is a run as any other, on record and in the lineage, and what it ends with is named after the
version's name, ``NAME.remedy``. Where the last task was trained with rehearsal, clients rehearse
what they kept; else the data of all its tasks are read as one, where nobody was promised otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clients import data
from clients.accounting import BudgetSpent
from clients.regularizers import rehearses
from clients.site import Site
from clients.weights import ModelNotFound
from orchestrator.config import BadConfig, RunConfig, parse_config, with_values
from orchestrator.coordinator import Driving, claim, drive, planned
from orchestrator.federation import Observe
from orchestrator.joint import joined
from orchestrator.launch import make_plan
from orchestrator.plan import Plan
from orchestrator.rehearsed import levels
from orchestrator.service import submit
from orchestrator.signing import Unsigned
from orchestrator.steering import document_of, requeue
from orchestrator.stream import TASK
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json
from storage.ledger import Queueing, RunExists, RunRecord

REMEDY = "remedy"
"""The label of such runs: the beginning of the id of the version that they go on from."""
_SHARE = 4
"""They have one of so many of the last task's rounds."""
_UNPLANNED = (BadConfig, BudgetSpent, ModelNotFound, Unsigned, data.DataNotFound, data.BadDataURI)


class NoReplay(ValueError):
    """What a version learned before cannot be replayed, or must not be."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A run that replays what a version learned before.

    Attributes:
        version: id of the version that it goes on from.
        config: of the run.
        tasks: whose data it has, the oldest first.
        kept: whether clients rehearse what they kept of them; else all data are read as one.
        seconds: how long it may take, by how long the last task took a round; None where unknown.
    """

    version: str
    config: RunConfig
    tasks: tuple[str, ...]
    kept: bool
    seconds: float | None

    def __str__(self) -> str:
        """Return it as people read it."""
        rounds = self.config.rounds
        what = "what clients kept of" if self.kept else "the data of"
        time = "" if self.seconds is None else f", about {self.seconds:.0f} s"
        return (
            f"replay, {rounds} round{'s' * (rounds > 1)} on {what} {', '.join(self.tasks)}"
            f" (run {self.config.name}{time})"
        )


def plan_replay(workspace: Workspace, version: str, name: str) -> Replay:
    """Return the run that would replay what a version learned before; nothing is queued.

    It has a quarter of the last task's rounds, at least one, and all else of that run's settings.

    Args:
        workspace: where.
        version: id of the version.
        name: the name that it is a version of.

    Raises:
        NoReplay: with the reason.
    """
    runs = _runs_behind(workspace, version)
    last = runs[-1]
    values: dict[str, Any] = {
        "name": f"{name}.{REMEDY}",
        "start": "continue",
        "start_from": version,
        "rounds": max(1, last.rounds // _SHARE),
        "faults": None,
        "accept_unbounded": None,  # somebody accepted it of another run
    }
    rehearsed = _rehearses(last) and any(map(_rehearses, runs[:-1]))
    try:
        plan = _planned(workspace, last, values) if rehearsed else None
        kept = plan is not None and _has_kept(workspace, plan)
        if plan is None or not kept:
            plan = _planned(workspace, last, values | _together(workspace, runs))
    except _UNPLANNED as error:
        raise NoReplay(str(error)) from error
    away = [one.name for one in plan.participants if data.is_elsewhere(one.data.uri)]
    if away:
        raise NoReplay(
            f"the data of {away[0]} lie at its site, which no remedy waits for; launch a run that "
            "goes on from the version with start: continue"
        )
    tasks = tuple(_task_of(record) for record in runs)
    return Replay(version, plan.config, tasks, kept, _seconds(last, plan.config.rounds))


def _planned(workspace: Workspace, record: RunRecord, values: Mapping[str, Any]) -> Plan:
    config = parse_config(with_values(document_of(record), values))
    return make_plan(config, workspace.store, workspace.ledger, workspace.sites)


def run_replay(workspace: Workspace, replay: Replay, observe: Observe, driving: Driving) -> str:
    """Run what was planned, or go on with it, and return the version that it ends with.

    The same of the same version is one run: one that is completed is not run again.

    Args:
        workspace: where.
        replay: what to run.
        observe: called with each event.
        driving: how.

    Raises:
        RunBusy: if another process is driving it.
        RoundFailed, Paused, Cancelled, Stopped: as :func:`orchestrator.coordinator.drive`.
    """
    record = _queued(workspace, replay)
    if record.status == "completed" and record.version is not None:
        return record.version
    return drive(workspace, claim(workspace, record, driving.lease_s), observe, driving)


def _queued(workspace: Workspace, replay: Replay) -> RunRecord:
    """Return the run, in the queue if it is not done."""
    ledger, label = workspace.ledger, replay.version[:12]
    past = [ledger.run(run) for run in ledger.queue.labelled(REMEDY, label)]
    cancelled = [record.id for record in past if record.status == "cancelled"]
    facts = [replay.version, replay.config.model_dump(mode="json"), cancelled]
    run = hashlib.sha256(canonical_json(facts, "a remedy").encode()).hexdigest()[:12]
    with suppress(RunExists):
        submit(workspace, replay.config, Queueing(labels={REMEDY: label}), run)
    record = ledger.run(run)
    return requeue(workspace, run) if record.status in ("failed", "paused") else record


def _runs_behind(workspace: Workspace, version: str) -> list[RunRecord]:
    """Return the runs that made what a version has learned, the last task's last.

    Raises:
        NoReplay: if there are not two, of which one is of a past task.
    """
    found = list(_ended(workspace, version))
    if not found:
        raise NoReplay("no run here made the version, so nobody knows whose data to replay")
    if len(found) < 2:
        raise NoReplay(
            f"run {found[0].name} is the only one here that made the version: there is no earlier "
            "task whose data could be replayed"
        )
    return found[::-1]


def _ended(workspace: Workspace, version: str) -> Iterator[RunRecord]:
    """Yield the completed runs whose results a version goes back to, the nearest first."""
    lineage = workspace.store.lineage(version)
    within = {edge.parent for edge in lineage.edges if edge.kind == "round"}
    for level in levels(lineage):
        runs = []
        for one in level:
            if one == version or one not in within:  # a round that a round followed ended nothing
                ended = map(workspace.ledger.run, workspace.ledger.runs_at(one)[::-1])
                runs += [next((run for run in ended if run.status == "completed"), None)]
        yield from sorted(filter(None, runs), key=lambda run: run.created_at, reverse=True)


def _task_of(record: RunRecord) -> str:
    return record.labels.get(TASK, record.name)


def _rehearses(record: RunRecord) -> bool:
    choices = record.config["regularizers"]
    return any(rehearses(one["name"], one["options"]) for one in choices)


def _together(workspace: Workspace, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what of a config has the clients of all runs train on the labels of all.

    Raises:
        NoReplay: if the data of one may not be read again.
        BadConfig: if their clients are not alike.
    """
    for record in runs:
        plan = planned(workspace.ledger, record)
        public = all(one.public for one in plan.participants)
        if plan.config.privacy is not None and not public:
            raise NoReplay(
                f"{_task_of(record)} was trained with differential privacy, and data that are not "
                "public are not trained on again for a remedy; extend or clone its run instead"
            )
        if plan.config.clients.simulate is None and not public:
            raise NoReplay(
                f"{_task_of(record)} was trained by registered clients, whose data are not public "
                "and are asked for again by no remedy; run each task with the regularizer replay, "
                "which keeps examples at them"
            )
    every = {label for record in runs for label in record.config["task_labels"]}
    whole = any(not record.config["task_labels"] for record in runs)
    labels = runs[-1].config["labels"]
    return {
        "clients": joined([record.config["clients"] for record in runs]),
        "task_labels": [] if whole else [label for label in labels if label in every],
    }


def _has_kept(workspace: Workspace, plan: Plan) -> bool:
    """Return whether some client that takes part has examples that it kept."""
    site = Site(workspace.sites)
    pasts = ((one.name, one.past.update) for one in plan.participants if one.past)
    return any(update and site.kept_examples(name, update) for name, update in pasts)


def _seconds(record: RunRecord, rounds: int) -> float | None:
    if record.started_at is None or record.finished_at is None or not record.rounds:
        return None
    return (record.finished_at - record.started_at).total_seconds() * rounds / record.rounds
