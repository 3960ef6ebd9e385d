"""What was spent of people's privacy: spent, planned and left, by population, run and version."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.budgets import planned_spends
from orchestrator.coordinator import planned
from orchestrator.epsilons import DELTA, Epsilon, composed, spend_from_row
from orchestrator.provenance import lineage
from orchestrator.workspace import Workspace
from storage.ledger import ClientRecord, Ledger, RunRecord, SpendRow, Status
from storage.records import FINAL, STATUSES, Policy
from storage.unprotected import Unprotected
from strategies.spends import PrivacySpend


class UnknownPopulation(LookupError):
    """Nobody has this population, and nothing was spent on one."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a population may spend in all.

    Attributes:
        epsilon: > 0.
        delta: in (0, 1).
        policy: what becomes of a run that it has too little left for.
    """

    epsilon: float
    delta: float
    policy: Policy


@dataclass(frozen=True, slots=True)
class Share:
    """What one run has spent of a budget.

    Attributes:
        run: its id.
        name: what people call it; "" for a run of another store.
        status: where it stands; "" likewise.
        version: its newest version, or None.
        populations: on whose data: the population's, or of those that share records with it.
        rounds: in how many rounds somebody of them was asked.
        spent: the ε of this run alone, one for each unit.
    """

    run: str
    name: str
    status: str
    version: str | None
    populations: tuple[str, ...]
    rounds: int
    spent: tuple[Epsilon, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """All that is known of what a population has spent.

    Attributes:
        population: whose privacy.
        clients: registered clients that hold its data.
        related: populations that share records with it, whose spends count here too.
        budget: what it may spend, or None.
        spent: the ε of everything so far, one for each unit: different ones cannot be added.
        planned: the same when the runs that have not ended will have spent what they may.
        left: what the budget has left of ε now, >= 0, or None without a budget.
        runs: what each run has spent.
        unprotected: runs without DP: no ε bounds what they tell.
    """

    population: str
    clients: tuple[str, ...]
    related: tuple[str, ...]
    budget: Budget | None
    spent: tuple[Epsilon, ...]
    planned: tuple[Epsilon, ...]
    left: float | None
    runs: tuple[Share, ...]
    unprotected: tuple[Unprotected, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        without = [
            {**asdict(one), "created_at": one.created_at.isoformat()} for one in self.unprotected
        ]
        return {**asdict(self), "unprotected": without}


def statements(
    workspace: Workspace, wanted: Sequence[str] = (), limit: int | None = None, after: str = ""
) -> list[Statement]:
    """Return the statements of populations, by name; registers and spends nothing.

    Args:
        workspace: where.
        wanted: populations or registered clients, or none for all.
        limit: how many at most; None for no limit.
        after: only those whose names come after this one.

    Raises:
        UnknownPopulation: if one of ``wanted`` is neither.
    """
    records = workspace.ledger.clients()
    known = {*workspace.ledger.populations(), *workspace.ledger.spent_populations()}
    names = sorted(_named(wanted, records, known) if wanted else known)
    page = [name for name in names if name > after][:limit]
    open_runs = _open_runs(workspace)
    return [_statement(workspace, name, records, open_runs) for name in page]


def of_version(workspace: Workspace, ref: str) -> list[dict[str, Any]]:
    """Return what a version has inherited, by population, beside what its budget allows, as JSON.

    Raises:
        UnknownVersion: if there is no such version.
    """
    budgets = workspace.ledger.budgets()
    found = []
    for spent in lineage(workspace, ref).epsilons:
        budget = budgets.get(spent.population)
        limit = None if budget is None else {"epsilon": budget[0], "delta": budget[1]}
        found.append({**asdict(spent), "budget": limit, "text": str(spent)})
    return found


def _named(
    wanted: Iterable[str], records: Sequence[ClientRecord], known: Collection[str]
) -> set[str]:
    by_client = {record.name: record.population for record in records}
    found = set()
    for name in wanted:
        population = name if name in known else by_client.get(name)
        if population is None:
            raise UnknownPopulation(
                f"no population or client is called {name!r}, and nothing was spent on one; "
                "weft privacy status lists those that there are"
            )
        found.add(population)
    return found


def _open_runs(workspace: Workspace) -> dict[str, dict[str, list[PrivacySpend]]]:
    """Return what the runs that may go on spend in all, by run and population."""
    found: dict[str, dict[str, list[PrivacySpend]]] = {}
    for record in _going_on(workspace.ledger):
        plan = planned(workspace.ledger, record)
        spends = planned_spends(plan)
        for who in plan.participants if spends else ():
            own = found.setdefault(record.id, {})
            own.setdefault(who.population, []).extend(spends[who.name])
    return found


def _going_on(ledger: Ledger) -> Iterator[RunRecord]:
    """Yield the runs that have not ended, or may be resumed."""
    open_: list[Status] = [one for one in STATUSES if one not in FINAL or one == "failed"]
    for status in open_:
        page = ledger.runs(status=status)
        while page:
            yield from page
            page = ledger.runs(status=status, before=page[-1].id)


def _statement(
    workspace: Workspace,
    population: str,
    records: Sequence[ClientRecord],
    open_runs: Mapping[str, Mapping[str, Sequence[PrivacySpend]]],
) -> Statement:
    ledger = workspace.ledger
    limit, related = ledger.budget(population), ledger.relations.of(population)
    budget = None if limit is None else Budget(*limit, ledger.policies()[population])
    holders = [record for record in records if record.population == population]
    public = bool(holders) and all(record.public for record in holders)
    counted = {population, *related}
    rows = ledger.spends(population)
    coming = [
        spend
        for own in open_runs.values()
        for name in sorted(counted & own.keys())
        for spend in own[name]
    ]
    done = [spend_from_row(row) for row in rows if row.run not in open_runs]
    delta = budget.delta if budget else DELTA
    spent = _by_unit(population, [spend_from_row(row) for row in rows], delta, public)
    used = max((one.epsilon for one in spent), default=0.0)
    return Statement(
        population=population,
        clients=tuple(record.name for record in holders),
        related=tuple(sorted(related)),
        budget=budget,
        spent=spent,
        planned=_by_unit(population, [*done, *coming], delta, public),
        left=None if budget is None else max(0.0, budget.epsilon - used),
        runs=tuple(_shares(workspace, population, rows, delta)),
        unprotected=tuple(ledger.unprotected.of(counted)),
    )


def _by_unit(
    population: str, spends: Sequence[PrivacySpend], delta: float, public: bool = False
) -> tuple[Epsilon, ...]:
    """Return the ε of what can be added: spends of one mechanism, unit and adjacency."""
    kinds: dict[tuple[str, str, str], list[PrivacySpend]] = {}
    for spend in spends:
        kinds.setdefault((spend.unit, spend.adjacency, spend.mechanism), []).append(spend)
    return tuple(
        composed(population, alike, delta, public=public) for _, alike in sorted(kinds.items())
    )


def _shares(
    workspace: Workspace, population: str, rows: Sequence[SpendRow], delta: float
) -> list[Share]:
    by_run: dict[str, list[SpendRow]] = {}
    for row in rows:
        by_run.setdefault(row.run, []).append(row)
    found = []
    for run, own in by_run.items():
        try:
            record = workspace.ledger.run(run)
            facts = (record.name, str(record.status), record.version)
        except LookupError:  # its store was restored without it: a spend outlives its run
            facts = ("", "", None)
        found.append(
            Share(
                run,
                *facts,
                populations=tuple(sorted({row.population for row in own})),
                rounds=len({row.round for row in own}),
                spent=_by_unit(population, [spend_from_row(row) for row in own], delta),
            )
        )
    return found
