"""Populations that share records, as the site where the data are finds them, for the ledger."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clients.assignment import DataSpec, ModelSpec
from clients.census import Census, Holding
from clients.holdout import Holdout
from clients.sources import is_public, is_there
from storage.ledger import ClientRecord, Ledger

if TYPE_CHECKING:  # torch takes seconds, and registering a client needs none
    from orchestrator.plan import Participant, Plan


def relate(
    participants: Iterable[Participant], model: ModelSpec, ledger: Ledger, sites: Path
) -> None:
    """Take a census of the clients' data that are here, and tell the ledger what it found.

    Whose data did not change since is not read. What is elsewhere cannot be looked at from here,
    and public data cost nobody anything.

    Args:
        participants: of a run.
        model: its base model, by whose labels simulated clients are split.
        ledger: where relations are recorded.
        sites: folder of the clients' private state, which the census never leaves.
    """
    specs = [
        (p.population, replace(spec, labels=()) if spec.shard is None else spec)
        for p in participants
        for spec in _sets_of(p)
        if not p.public
    ]
    _record([Holding(population, spec, model) for population, spec in specs], ledger, sites)


def _sets_of(who: Participant) -> list[DataSpec]:
    """Return a client's data sets: what it trains on, and what it holds out elsewhere."""
    elsewhere = who.holdout is not None and who.holdout.uri != who.data.uri
    return [who.data, who.holdout] if who.holdout and elsewhere else [who.data]


def relate_again(plan: Plan, cohort: Collection[str], ledger: Ledger, sites: Path) -> None:
    """Look again before a round: data may have changed since the run was planned.

    Args:
        plan: the run's.
        cohort: who is asked; nobody stands for everybody.
        ledger: where relations are recorded.
        sites: folder of the clients' private state.
    """
    if _matters(plan, ledger):
        asked = [p for p in plan.participants if not cohort or p.name in cohort]
        relate(asked, plan.model, ledger, sites)


def relate_planned(plan: Plan, ledger: Ledger, sites: Path) -> None:
    """Find out whose data a new run shares with whom, where it can matter.

    Whoever has a budget is looked at too, whether it takes part or not.
    """
    budgets = ledger.budgets()
    if budgets:
        protected = [r for r in ledger.clients() if r.population in budgets]
        unit = plan.config.privacy.unit_column if plan.config.privacy else ""
        relate_registered(protected, ledger, sites, unit)
    if _matters(plan, ledger):
        relate(plan.participants, plan.model, ledger, sites)


def _matters(plan: Plan, ledger: Ledger) -> bool:
    """Return whether anything depends on who shares records: a spend to come, or a budget."""
    privacy = plan.config.privacy
    return (privacy is not None and privacy.insecure_seed is None) or bool(ledger.budgets())


def relate_registered(
    records: Iterable[ClientRecord], ledger: Ledger, sites: Path, unit: str = ""
) -> None:
    """As :func:`relate`, of registered clients; ``unit`` is the column of a run's units."""
    holdings = [
        Holding(r.population, DataSpec(uri, dict(r.fields), unit=column))
        for r in records
        if not r.public
        for uri in held_by(r)
        for column in dict.fromkeys(("", unit))
    ]
    _record(holdings, ledger, sites)


def held_by(record: ClientRecord) -> list[str]:
    """Return where a client's data are: what it trains on, and what it holds out elsewhere."""
    elsewhere = Holdout.of(record.holdout).data if record.holdout else ""
    return [record.data, elsewhere] if elsewhere else [record.data]


def _record(holdings: Iterable[Holding], ledger: Ledger, sites: Path) -> None:
    here = [h for h in holdings if not is_public(h.data.uri) and is_there(h.data.uri)]
    if not here:
        return
    census = Census(sites)
    census.take(here)
    ledger.relations.add(census.related({h.population for h in here}))
