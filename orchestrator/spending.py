"""Privacy budgets: noise is calibrated before round 1; every spend is on the ledger first."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from clients.accounting import BudgetSpent, IncomposableSpends, epsilon, noise_for
from clients.assignment import Assignment, Clipping, Privacy, Report
from clients.charges import charge_of
from clients.downlink import DIGEST_BYTES
from clients.keys import site_mark
from clients.sources import is_elsewhere
from orchestrator.epsilons import Epsilon, composed, spend_from_row
from orchestrator.plan import Participant, Plan
from orchestrator.sections import PrivacyConfig
from storage.ledger import Ledger, SpendRow
from strategies.base import Tensors
from strategies.spends import PrivacySpend

_LOW = 0.8  # of a budget: from here on, people are told


Low: TypeAlias = dict[str, dict[str, Any]]
"""Facts of budgets that get low, by population."""


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
    besides: Sequence[PrivacySpend] = (),
) -> Privacy:
    """Return a client's DP-SGD for a whole run.

    The noise is the smallest with which the run alone, what it spends ``besides`` included, spends
    at most ``config.epsilon``, and the run on top of ``history`` at most the budget.

    Args:
        config: the run's privacy section.
        sample_rate: probability of an example per step, in (0, 1].
        steps: optimizer steps over all rounds in which the client may take part.
        history: what its population has spent.
        budget: (epsilon, delta) that the population may spend in all, or None.
        besides: what the run spends on the client's data but by training.

    Raises:
        BudgetSpent: if no noise keeps within the budget.
        IncomposableSpends: if the history hides something else than this would.
    """
    noise = config.noise_multiplier or 0.0
    if config.epsilon is not None:
        noise = noise_for(
            config.epsilon,
            config.delta,
            sample_rate=sample_rate,
            steps=steps,
            history=besides,
            accountant=config.accountant,
        )
    if budget is not None and config.noise_multiplier is None:
        refuse_other_kinds(history, config.unit, "add-remove")
        needed = noise_for(
            budget[0],
            budget[1],
            sample_rate=sample_rate,
            steps=steps,
            history=[*history, *besides],
            accountant=config.accountant,
        )
        noise = max(noise, needed)
    return Privacy(
        noise_multiplier=noise,
        max_grad_norm=config.max_grad_norm,
        sample_rate=sample_rate,
        unit=config.unit,
        insecure_seed=config.insecure_seed,
        clipping=Clipping(**config.clipping.model_dump()),
        per_unit=config.per_unit,
        report=Report(**config.report.model_dump()) if config.report else None,
    )


def refuse_other_kinds(history: Sequence[PrivacySpend], unit: str, adjacency: str) -> None:
    """Refuse to go on with a history that hides something else.

    Raises:
        IncomposableSpends: naming both.
    """
    for spend in history:
        if (spend.unit, spend.adjacency) != (unit, adjacency):
            raise IncomposableSpends(
                f"spends of unit {spend.unit} ({spend.adjacency}) are on its record, and this run's"
                f" are of unit {unit} ({adjacency}), which cannot be added; leave it out"
            )


def reserve(
    assignments: Sequence[Assignment],
    people: Mapping[str, Participant],
    ledger: Ledger,
    log: Log,
    sent: Mapping[str, Assignment] | None = None,
) -> list[Assignment]:
    """Put each assignment's spend on the ledger and return those that keep within their budget.

    Durable before anything is sent: a crash overstates what was spent and never understates it.
    A round that is run again after a crash has the same events, which count once: the sites send
    again what they have sent, or make it under the same keys. A site whose keys are lost would make
    another update, with other noise. That is another event, and costs again.

    Args:
        assignments: of one round and one base version, at least one.
        people: by name.
        ledger: where spends are.
        log: told who was refused, then who is asked.
        sent: by client: its assignment as it travels; None where they travel as they are.
    """
    private = [a for a in assignments if a.private and a.action == "train"]  # no other spends
    rows = _rows(private, {a.client: people[a.client].population for a in private})
    over, low = _recorded(rows, ledger)
    for row in rows:
        if row.client in over:
            reason = str(over[row.client])
            facts = {"client": row.client, "round": row.round, "reason": reason, "fault": False}
            log("refused", facts)
    for facts in low.values():
        log("budget low", facts)
    kept = [a for a in assignments if a.client not in over]
    first = assignments[0]
    spent = {row.client: row.event for row in rows if row.client not in over}
    if spent:
        log("spent", {"round": first.round, "events": spent})
    asked = {"round": first.round, "base": first.base, "assigned": [a.client for a in kept]}
    travelling = kept if sent is None else [sent[a.client] for a in kept]
    log("assigned", {**asked, **bytes_sent(travelling)})
    return kept


def charged(
    assignments: Sequence[Assignment], populations: Mapping[str, str], ledger: Ledger
) -> dict[str, BudgetSpent]:
    """Put private evaluations on the ledger; return why clients are over their budget, by name.

    Durable before anything is sent, as with :func:`reserve`.

    Args:
        assignments: of one evaluation.
        populations: by client.
        ledger: where spends are.
    """
    return _recorded(_rows(assignments, populations), ledger)[0]


def _rows(assignments: Sequence[Assignment], populations: Mapping[str, str]) -> list[SpendRow]:
    marks = {_where(a): _mark(a) for a in assignments}
    return [_row(a, populations[a.client], marks[_where(a)]) for a in assignments]


def note_unprotected(plan: Plan, ledger: Ledger, rehearsed: Collection[str] = ()) -> None:
    """Put on the ledger, for ever, whose data a run trains on without privacy, before it does.

    Args:
        plan: the run's.
        ledger: where.
        rehearsed: populations of whose data clients kept some, which they train on again.
    """
    privacy = plan.config.privacy
    if privacy is not None and privacy.insecure_seed is None:
        return
    populations = {p.population for p in plan.participants if not p.public} | set(rehearsed)
    reason = plan.config.accept_unbounded or ""
    ledger.unprotected.add(plan.run, populations, reason, getpass.getuser())


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


def _recorded(rows: Sequence[SpendRow], ledger: Ledger) -> tuple[dict[str, BudgetSpent], Low]:
    """Record what keeps within its budget; return the others' errors by client, and what is low.

    All at once, which is one transaction; one by one where somebody is over its budget.
    """
    low: Low = {}
    if not rows:
        return {}, low
    try:
        ledger.record_spends_within(rows, _within(ledger.budgets(), low))
    except BudgetSpent as error:
        if len(rows) == 1:
            return {rows[0].client: error}, low
        over: dict[str, BudgetSpent] = {}
        low = {}
        for row in rows:
            errors, facts = _recorded([row], ledger)
            over |= errors
            low |= facts
        return over, low
    return {}, low


def _where(assignment: Assignment) -> tuple[str, bool]:
    """Return what tells the sites of a round's clients apart: a folder, and whether it is here."""
    return assignment.site, is_elsewhere(assignment.data.uri)


def _mark(assignment: Assignment) -> str:
    """Return which site would make the update; nothing where its noise comes from no key of its.

    Nothing either of a site elsewhere, whose keys cannot be looked at: its own ledger is there.
    """
    noise = assignment.privacy or assignment.noise_share
    keyed = noise is not None and noise.insecure_seed is None
    folder, elsewhere = _where(assignment)
    return site_mark(Path(folder)) if keyed and not elsewhere else ""


def _row(assignment: Assignment, population: str, mark: str) -> SpendRow:
    return SpendRow(**asdict(charge_of(assignment, population, mark)))


def _within(budgets: Mapping[str, tuple[float, float]], low: Low) -> Any:
    """Return the check that the ledger makes inside its transaction.

    Args:
        budgets: (epsilon, delta) by population.
        low: gains what there is to say where spends bring a population over four fifths of its
            budget, or would bring it over the whole.
    """

    def check(population: str, existing: Sequence[SpendRow], new: Sequence[SpendRow]) -> None:
        if population not in budgets:
            return
        limit, delta = budgets[population]
        before = {row.event: spend_from_row(row) for row in existing}
        after = before | {row.event: spend_from_row(row) for row in new}
        if len(after) == len(before):
            return  # a round run again after a crash: already counted
        try:
            total = epsilon(after.values(), delta)
        except IncomposableSpends as error:
            raise BudgetSpent(f"{new[0].client}: population {population}: {error}") from None
        if total <= _LOW * limit:
            return
        spent = epsilon(before.values(), delta)
        facts = {"population": population, "limit": limit, "delta": delta}
        if total > limit + 1e-9:
            low[population] = {**facts, "epsilon": spent}
            raise BudgetSpent(
                f"{new[0].client} has spent ε = {spent:.2f} of {limit:g} (δ = {delta:g}, "
                f"population {population}{_through(population, new[0])}); this round would bring "
                f"it to {total:.2f}. "
                "Raise its budget or leave it out"
            )
        if spent <= _LOW * limit:
            low[population] = {**facts, "epsilon": total}

    return check


def _through(population: str, row: SpendRow) -> str:
    """Return why a spend on one population counts against the budget of another."""
    if row.population == population:
        return ""
    return f", with which {row.population} shares records"


def bytes_sent(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Return the size of all tensors that are sent, each counted for every client it goes to.

    That is the broadcast, what lies beneath it, and regularizers' memory; where clients are not
    sent what they hold, with the digests of what that is. Also by client, where clients are sent
    different things, or over a network that is somebody's.
    """
    sizes: dict[int, int] = {}

    def size(tensors: Tensors) -> int:
        if id(tensors) not in sizes:
            sizes[id(tensors)] = sum(tensor.nbytes for tensor in tensors.values())
        return sizes[id(tensors)]

    def of(a: Assignment) -> int:
        sent = a.broadcast
        parts = (sent.tensors, sent.mask, sent.extra, a.underlay, a.memory)
        return sum(size(part) for part in parts) + DIGEST_BYTES * len(a.held or {})

    own = {a.client: of(a) for a in assignments}
    total = {"bytes": sum(own.values())}
    by_client = any(a.held is not None or is_elsewhere(a.data.uri) for a in assignments)
    return {**total, "bytes_by_client": own} if by_client else total
