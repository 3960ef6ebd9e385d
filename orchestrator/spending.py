"""Privacy budgets: noise is calibrated before round 1; every spend is on the ledger first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from clients.accounting import Accountant, BudgetSpent, epsilon, noise_for
from clients.assignment import Assignment, Privacy
from clients.trainer import spend_of
from orchestrator.config import PrivacyConfig
from orchestrator.plan import Plan
from storage.ledger import Ledger, SpendRow
from strategies.base import PrivacySpend

_LOW = 0.8  # of a budget: from here on, people are told


@dataclass(frozen=True, slots=True)
class Epsilon:
    """An ε that can be read alone.

    Attributes:
        population: whose privacy.
        epsilon: spent.
        delta: at this δ.
        unit: whose presence is hidden.
        adjacency: in which sense.
        public: whether the data are public, so that nothing is at stake.
    """

    population: str
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    public: bool = False

    def __str__(self) -> str:
        return f"ε = {self.epsilon:.2f} (δ = {self.delta:g}, unit {self.unit}, {self.adjacency})"


class Log(Protocol):
    """Writes an event."""

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write it."""
        ...


def calibrated(
    config: PrivacyConfig,
    *,
    sample_rate: float,
    steps: int,
    history: Sequence[PrivacySpend] = (),
    budget: tuple[float, float] | None = None,
) -> Privacy:
    """Return a client's DP-SGD for a whole run.

    The noise is the smallest with which the run alone spends at most ``config.epsilon``, and the
    run on top of ``history`` at most the budget.

    Args:
        config: the run's privacy section.
        sample_rate: probability of an example per step, in (0, 1].
        steps: optimizer steps over all rounds in which the client may take part.
        history: what its population has spent.
        budget: (epsilon, delta) that the population may spend in all, or None.

    Raises:
        BudgetSpent: if no noise keeps within the budget.
    """
    noise = config.noise_multiplier or 0.0
    if config.epsilon is not None:
        noise = noise_for(
            config.epsilon,
            config.delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=config.accountant,
        )
    if budget is not None and config.noise_multiplier is None:
        needed = noise_for(
            budget[0],
            budget[1],
            sample_rate=sample_rate,
            steps=steps,
            history=history,
            accountant=config.accountant,
        )
        noise = max(noise, needed)
    return Privacy(
        noise_multiplier=noise,
        max_grad_norm=config.max_grad_norm,
        sample_rate=sample_rate,
        unit=config.unit,
        insecure_seed=config.insecure_seed,
    )


def reserve(
    plan: Plan, assignments: list[Assignment], ledger: Ledger, log: Log
) -> list[Assignment]:
    """Put each assignment's spend on the ledger and return those that keep within their budget.

    Durable before anything is sent: a crash overstates what was spent and never understates it.
    A round that is run again after a crash has the same events, which count once.
    """
    populations = {p.name: p.population for p in plan.participants}
    kept = []
    for assignment in assignments:
        if assignment.privacy is None:
            kept.append(assignment)
            continue
        row = _row(plan, assignment, populations[assignment.client])
        budget, low = ledger.budget(row.population), list[dict[str, Any]]()
        try:
            ledger.record_spends_within([row], _within(assignment.client, budget, low))
        except BudgetSpent as error:
            log("refused", {"client": assignment.client, "reason": str(error)})
        else:
            kept.append(assignment)
        for facts in low:
            log("budget low", facts)
    names, size = [a.client for a in kept], _bytes_sent(kept)
    log("assigned", {"round": _round(assignments), "assigned": names, "bytes": size})
    return kept


def spent_by_run(plan: Plan, ledger: Ledger) -> dict[str, Epsilon]:
    """Return what a run has spent so far, by population; two clients may share one."""
    privacy = plan.config.privacy
    if privacy is None:
        return {}
    rows: dict[str, list[SpendRow]] = {}
    for row in ledger.spends_of_run(plan.run):
        rows.setdefault(row.population, []).append(row)
    public = {p.population: p.public for p in plan.participants}
    return {
        population: composed(
            population,
            [spend_from_row(r) for r in own],
            privacy.delta,
            privacy.accountant,
            public.get(population, False),
        )
        for population, own in sorted(rows.items())
    }


def composed(
    population: str,
    spends: Sequence[PrivacySpend],
    delta: float,
    accountant: Accountant = "prv",
    public: bool = False,
) -> Epsilon:
    """Return the ε of all ``spends`` together."""
    first = spends[0]
    value = epsilon(spends, delta, accountant)
    return Epsilon(population, value, delta, first.unit, first.adjacency, public)


def epsilon_of_lineage(recipes: Iterable[Mapping[str, Any]]) -> list[Epsilon]:
    """Return the ε that a version has inherited, by population: each event counts once.

    Args:
        recipes: of the version and all its ancestors.
    """
    events: dict[str, dict[str, list[PrivacySpend]]] = {}
    deltas: dict[str, float] = {}
    public: dict[str, bool] = {}
    for recipe in recipes:
        for leaf in recipe.get("updates", ()):
            if leaf["spends"]:
                population = leaf["population"]
                own = events.setdefault(population, {})
                own[leaf["digest"]] = [PrivacySpend(**s) for s in leaf["spends"]]
                delta = recipe["privacy"]["delta"]
                deltas[population] = min(delta, deltas.get(population, 1.0))
                public[population] = leaf["public"]
    return [
        composed(
            population,
            [spend for spends in own.values() for spend in spends],
            deltas[population],
            public=public[population],
        )
        for population, own in sorted(events.items())
    ]


def spend_from_row(row: SpendRow) -> PrivacySpend:
    """Return the composable part of a ledger row."""
    return PrivacySpend(row.mechanism, row.unit, row.adjacency, row.parameters)


def _row(plan: Plan, assignment: Assignment, population: str) -> SpendRow:
    spend = spend_of(assignment)
    digest = assignment.digest()
    text = "\0".join((plan.run, assignment.client, str(assignment.round), digest))
    return SpendRow(
        event=hashlib.sha256(text.encode()).hexdigest(),
        population=population,
        client=assignment.client,
        run=plan.run,
        round=assignment.round,
        assignment=digest,
        mechanism=spend.mechanism,
        unit=spend.unit,
        adjacency=spend.adjacency,
        parameters=dict(spend.parameters),
    )


def _within(client: str, budget: tuple[float, float] | None, low: list[dict[str, Any]]) -> Any:
    """Return the check that the ledger makes inside its transaction.

    Args:
        client: who is about to spend.
        budget: (epsilon, delta) of its population, or None for no budget.
        low: gains what there is to say where this spend brings a population over four fifths of
            its budget, or would bring it over the whole.
    """

    def check(population: str, existing: Sequence[SpendRow], new: Sequence[SpendRow]) -> None:
        if budget is None:
            return
        limit, delta = budget
        before = {row.event: spend_from_row(row) for row in existing}
        after = before | {row.event: spend_from_row(row) for row in new}
        if len(after) == len(before):
            return  # a round run again after a crash: already counted
        total = epsilon(after.values(), delta)
        if total <= _LOW * limit:
            return
        spent = epsilon(before.values(), delta)
        facts = {"population": population, "limit": limit, "delta": delta}
        if total > limit + 1e-9:
            low.append({**facts, "epsilon": spent})
            raise BudgetSpent(
                f"{client} has spent ε = {spent:.2f} of {limit:g} (δ = {delta:g}, population "
                f"{population}); this round would bring it to {total:.2f}. "
                "Raise its budget or leave it out"
            )
        if spent <= _LOW * limit:
            low.append({**facts, "epsilon": total})

    return check


def _bytes_sent(assignments: Sequence[Assignment]) -> int:
    """Return the size of the assignments' broadcasts, each counted for every client it goes to."""
    sizes: dict[int, int] = {}
    for a in assignments:
        if id(a.broadcast) not in sizes:
            sizes[id(a.broadcast)] = a.broadcast.size_bytes
    return sum(sizes[id(a.broadcast)] for a in assignments)


def _round(assignments: Sequence[Assignment]) -> int:
    return assignments[0].round if assignments else 0
