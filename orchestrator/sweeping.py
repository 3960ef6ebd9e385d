"""Runs of a sweep: what there is of them, what the rest would spend, queueing and driving it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients.accounting import BudgetSpent
from orchestrator.budgets import planned_spends
from orchestrator.coordinator import Driving, RunBusy, claim, drive_to_an_end, planned
from orchestrator.epsilons import Epsilon, composed, spend_from_row
from orchestrator.federation import Observe
from orchestrator.launch import make_plan
from orchestrator.observers.of_run import observers_of
from orchestrator.plan import Plan
from orchestrator.service import submit
from orchestrator.steering import requeue
from orchestrator.sweep import LABEL, Point, described, refuse_all
from orchestrator.workspace import Workspace
from storage.ledger import LeaseLost, Ledger, Queueing, RunRecord
from strategies.spends import PrivacySpend

_OURS = ("clients", "orchestrator", "storage", "strategies")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sweep's runs, as many as have not ended, bring one population to.

    Attributes:
        before: ε spent so far, at the δ of ``after``.
        after: ε when all of them will have spent what was planned.
        budget: the ε that the population may spend in all, or None.
        runs: how many of them train on its data.
    """

    before: float
    after: Epsilon
    budget: float | None
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON; ``epsilon`` is that after all runs."""
        return {
            **asdict(self.after),
            "before": self.before,
            "budget": self.budget,
            "runs": self.runs,
        }


@dataclass(frozen=True, slots=True)
class Standing:
    """A sweep and what there is of it.

    Attributes:
        name: the sweep's.
        points: all its runs.
        records: by a run's name, its record; without those that are missing.
        costs: what the runs that have not ended will have spent, a population each, under DP.
        unprotected: populations whose data are not public and are trained on without DP.
    """

    name: str
    points: tuple[Point, ...]
    records: Mapping[str, RunRecord]
    costs: tuple[Cost, ...] = ()
    unprotected: tuple[str, ...] = ()

    @property
    def missing(self) -> list[Point]:
        """The runs that were never queued."""
        return [point for point in self.points if point.name not in self.records]

    def status_of(self, point: Point) -> str:
        """Return where a run stands."""
        record = self.records.get(point.name)
        return "missing" if record is None else record.status

    def counts(self) -> dict[str, int]:
        """Return how many runs stand how, those that are missing last."""
        found: dict[str, int] = {}
        for point in sorted(self.points, key=lambda p: p.name not in self.records):
            status = self.status_of(point)
            found[status] = found.get(status, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        rows = []
        for point in self.points:
            record = self.records.get(point.name)
            rows.append(
                {
                    "name": point.name,
                    "values": dict(point.values),
                    "seed": point.seed,
                    "status": self.status_of(point),
                    "run": record and record.id,
                    "version": record and record.version,
                    "error": record and record.error,
                }
            )
        return {
            "sweep": self.name,
            "counts": self.counts(),
            "runs": rows,
            "costs": [
                {**asdict(c.after), **asdict(c) | {"after": c.after.epsilon}} for c in self.costs
            ],
            "unprotected": list(self.unprotected),
        }


def standing(workspace: Workspace, name: str, points: Sequence[Point]) -> Standing:
    """Return which runs of a sweep there are; plans nothing."""
    ledger = workspace.ledger
    records = [ledger.run(run) for run in ledger.queue.labelled(LABEL, name)]
    wanted = {point.name for point in points}
    newest = {record.name: record for record in records if record.name in wanted}
    return Standing(name, tuple(points), newest)


def forecast(workspace: Workspace, name: str, points: Sequence[Point]) -> Standing:
    """Return how a sweep stands, and what it will have spent when all its runs have ended.

    Each setting of which a run is missing is planned, which checks all there is to check; nothing
    is written.

    Raises:
        BadConfig: with a line for each mistake in any of them.
        BudgetSpent: if a population's budget would be passed.
    """
    found = standing(workspace, name, points)
    plans = _plans(workspace, found.missing)
    begun = {
        record.id: planned(workspace.ledger, record)
        for record in found.records.values()
        if record.status in ("queued", "running", "paused", "failed")
    }
    everybody = [*plans, *begun.values()]
    unprotected = {
        who.population
        for plan in everybody
        if plan.config.privacy is None
        for who in plan.participants
        if not who.public
    }
    costs = tuple(_costs(workspace.ledger, everybody, begun))
    for cost in costs:
        _refuse_too_much(cost)
    return replace(found, costs=costs, unprotected=tuple(sorted(unprotected)))


def queue(workspace: Workspace, found: Standing, queueing: Queueing, retry: bool = False) -> int:
    """Queue the runs of a sweep that are missing; return how many were.

    Args:
        workspace: where.
        found: from :func:`forecast`, which has checked them.
        queueing: how they wait; they have the label ``sweep`` besides.
        retry: put those that failed or were paused back into the queue too.
    """
    queueing = replace(queueing, labels={**queueing.labels, LABEL: found.name})
    for point in found.missing:
        submit(workspace, point.config, queueing)
    if retry:
        for record in found.records.values():
            if record.status in ("failed", "paused"):
                requeue(workspace, record.id)
    return len(found.missing)


def drive_all(
    workspace: Workspace, found: Standing, driving: Driving, watch: Callable[[RunRecord], Observe]
) -> None:
    """Drive the runs of a sweep that wait, one after another, here.

    How a run ends is on its record and is no error here. What another process drives is left to it.

    Args:
        workspace: where.
        found: the sweep, with its runs queued.
        driving: how; its ``stop`` ends the sweep too.
        watch: returns what is called with each event of a run.
    """
    for record in found.records.values():
        record = workspace.ledger.run(record.id)
        if driving.stop.is_set():
            return
        if record.status not in ("queued", "running"):
            continue
        with suppress(RunBusy, LeaseLost):
            mine = claim(workspace, record, driving.lease_s)
            drive_to_an_end(workspace, mine, watch(mine), driving)


def _plans(workspace: Workspace, missing: Sequence[Point]) -> list[Plan]:
    """Return a plan for each run; runs that differ in their seed alone are planned once.

    Raises:
        BadConfig: with a line for each mistake.
    """
    wrong: dict[str, list[str]] = {}
    plans: dict[str, Plan | None] = {}
    for point in missing:
        setting = described(point.values)
        if setting not in plans:
            plans[setting] = None
            try:
                plan = make_plan(point.config, workspace.store, workspace.ledger, workspace.sites)
                observers_of(plan, Path())
                plans[setting] = plan
            except (ValueError, LookupError, RuntimeError, OSError) as error:
                if type(error).__module__.partition(".")[0] not in _OURS:
                    raise
                text = str(error.args[0] if isinstance(error, LookupError) else error)
                wrong.setdefault(text, []).append(setting)
    refuse_all(wrong)
    return [made for p in missing if (made := plans[described(p.values)]) is not None]


def _costs(ledger: Ledger, plans: Sequence[Plan], begun: Mapping[str, Plan]) -> Iterator[Cost]:
    """Yield what ``plans`` bring each population to; ``begun`` is whose spends are in part made."""
    planned_by: dict[str, list[PrivacySpend]] = {}
    runs: dict[str, set[int]] = {}
    facts: dict[str, tuple[float, bool]] = {}
    for number, plan in enumerate(plans):
        own, privacy = planned_spends(plan), plan.config.privacy
        for who in plan.participants if privacy else ():
            assert privacy is not None
            planned_by.setdefault(who.population, []).extend(own[who.name])
            runs.setdefault(who.population, set()).add(number)
            delta = facts[who.population][0] if who.population in facts else 1.0
            facts[who.population] = (min(delta, privacy.delta), who.public)
    budgets, related = ledger.budgets(), ledger.relations.all()
    touched = {other for one in planned_by for other in related.get(one, ()) if other in budgets}
    for population in sorted(touched | planned_by.keys()):
        sharing = [p for p in (population, *related.get(population, ())) if p in planned_by]
        limit, delta = budgets.get(population, (None, facts.get(population, (1.0, False))[0]))
        rows = ledger.spends(population)
        past = [spend_from_row(row) for row in rows]
        ended = [spend_from_row(row) for row in rows if row.run not in begun]
        spends = [spend for one in sharing for spend in planned_by[one]]
        public = facts.get(population, (delta, False))[1]
        number = len(set().union(*(runs[one] for one in sharing)))
        for kind in sorted({_kind(spend) for spend in spends}):  # what hides other things is apart
            earlier, gone, new = ([s for s in x if _kind(s) == kind] for x in (past, ended, spends))
            before = composed(population, earlier, delta).epsilon if earlier else 0.0
            after = composed(population, [*gone, *new], delta, public=public)
            yield Cost(before, after, limit, number)


def _kind(spend: PrivacySpend) -> tuple[str, str]:
    return spend.unit, spend.adjacency


def _refuse_too_much(cost: Cost) -> None:
    """Refuse a sweep after which a population would have spent more than its budget.

    Raises:
        BudgetSpent: if it would.
    """
    if cost.budget is None or cost.after.epsilon <= cost.budget + 1e-9:
        return
    raise BudgetSpent(
        f"population {cost.after.population!r} has spent ε = {cost.before:.2f} of {cost.budget:g} "
        f"(δ = {cost.after.delta:g}), and the {cost.runs} runs of this sweep would bring it to "
        f"{cost.after.epsilon:.2f}: tuning on data that are not public spends as training does. "
        "Plan fewer runs or less ε a run, tune on public data, or raise its budget"
    )
