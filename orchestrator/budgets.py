"""Whether the budgets that a run touches have room for it, and what becomes of it if they have not.

A run touches the budget of each client's population, and of every population that shares records
with it (:mod:`orchestrator.relating`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from clients.accounting import Accountant, BudgetSpent, IncomposableSpends, epsilon, noise_for
from clients.assignment import Privacy
from orchestrator.cohort import goal, roster
from orchestrator.config import BadConfig
from orchestrator.epsilons import spend_from_row
from orchestrator.plan import Participant, Plan
from orchestrator.score_rules import scores_spend
from orchestrator.spending import calibrated, refuse_other_kinds
from storage.ledger import Ledger
from storage.records import Policy
from strategies.spends import CLIENT_UNIT, ZERO_OUT, ClientLevel, PrivacySpend

_ROUNDING = 1e-9
Spends: TypeAlias = tuple[PrivacySpend, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget, and what counts against it.

    Attributes:
        population: whose budget.
        epsilon: that it may spend in all.
        delta: of ``epsilon``.
        policy: what becomes of a run that it has too little left for.
        history: what was spent, on its data and on all that share records with them.
    """

    population: str
    epsilon: float
    delta: float
    policy: Policy
    history: tuple[PrivacySpend, ...]

    def total(self, planned: Sequence[PrivacySpend], accountant: Accountant = "prv") -> float:
        """Return the ε of the history and ``planned`` together.

        Raises:
            BudgetSpent: if they hide different things and cannot be added.
        """
        try:
            return epsilon([*self.history, *planned], self.delta, accountant)
        except IncomposableSpends as error:
            raise BudgetSpent(f"population {self.population!r}: {error}") from None

    def of(self, who: Participant) -> str:
        """Return whose budget it is, as a client that it limits would say it."""
        if who.population == self.population:
            return f"its population {self.population!r}"
        return (
            f"population {self.population!r}, with which its own {who.population!r} shares records,"
        )


@dataclass(frozen=True, slots=True)
class Coming:
    """What will be spent before a run is asked for.

    Attributes:
        spends: by population.
        runs: those that have begun: ``spends`` has all of theirs, also what is on the ledger.
    """

    spends: Mapping[str, Sequence[PrivacySpend]]
    runs: Collection[str] = ()

    def history(self, ledger: Ledger, population: str, related: Iterable[str]) -> Spends:
        """Return what will have been spent on a population and on all that share records with it.

        Args:
            ledger: what was spent.
            population: whose.
            related: which share records with it.
        """
        rows = (row for row in ledger.spends(population) if row.run not in self.runs)
        coming = (s for one in (population, *related) for s in self.spends.get(one, ()))
        return (*map(spend_from_row, rows), *coming)


class Budgets:
    """The budgets that there are; what counts against one is read where it is first asked for.

    Args:
        ledger: where they are; as it is now.
        coming: what else will be spent by then.
    """

    def __init__(self, ledger: Ledger, coming: Coming | None = None) -> None:
        self._ledger, self._coming = ledger, coming or Coming({})
        self._budgets, self._policies = ledger.budgets(), ledger.policies()
        self._related = ledger.relations.all() if self._budgets else {}
        self._known: dict[str, Limit] = {}

    def on(self, population: str) -> list[Limit]:
        """Return the budgets that count what is spent on a population, its own first."""
        names = [population, *sorted(self._related.get(population, ()))]
        return [self._limit(name) for name in names if name in self._budgets]

    def touched(self, plan: Plan) -> list[tuple[Limit, list[Participant]]]:
        """Return the budgets that a run touches, each with the clients that spend of it."""
        found: dict[str, tuple[Limit, list[Participant]]] = {}
        for who in plan.participants:
            for limit in self.on(who.population):
                found.setdefault(limit.population, (limit, []))[1].append(who)
        return [found[name] for name in sorted(found)]

    def _limit(self, name: str) -> Limit:
        if name not in self._known:
            related = sorted(self._related.get(name, ()))
            history = self._coming.history(self._ledger, name, related)
            self._known[name] = Limit(name, *self._budgets[name], self._policies[name], history)
        return self._known[name]


def check_limits(who: Participant, plan: Plan, limits: Sequence[Limit]) -> None:
    """Refuse a client in a run that its budgets do not go with, whatever is left of them.

    Raises:
        BadConfig: if the run has no DP that counts, or the budget a δ that means nothing.
    """
    config = plan.config
    for limit in limits:
        if config.privacy is None and config.accept_unbounded is None:
            raise BadConfig(
                f"{who.name}: {limit.of(who)} has a privacy budget (ε = {limit.epsilon:g}), and "
                "this run has no privacy; add a privacy section or leave the client out. If its "
                "owner agrees that no ε bounds what the run tells: --accept-unbounded --reason WHY"
            )
        if config.privacy is not None and config.privacy.insecure_seed is not None:
            raise BadConfig(
                f"{who.name}: privacy.insecure_seed gives no privacy, and {limit.of(who)} has a "
                f"budget (ε = {limit.epsilon:g}); leave insecure_seed out"
            )
        own = limit.population == who.population
        if own and who.num_examples and limit.delta >= 1 / who.num_examples:
            raise BadConfig(
                f"{who.name}: the budget of {limit.of(who)} has δ = {limit.delta:g}, which is not "
                f"below 1/{who.num_examples}, one over its size; give it a smaller one with weft "
                "privacy budget"
            )


def planned_spends(plan: Plan) -> dict[str, list[PrivacySpend]]:
    """Return what each client of a run spends in all, at most, by its name; none without DP."""
    if plan.config.privacy is None:
        return {}
    most = most_rounds(plan)
    return {who.name: spends_over(who, plan, most) for who in plan.participants}


def most_rounds(plan: Plan) -> int:
    """Return in how many of a run's rounds a client takes part, at most."""
    return min(plan.max_participations, plan.config.rounds)


def spends_over(who: Participant, plan: Plan, rounds: int) -> list[PrivacySpend]:
    """Return what ``rounds`` rounds of a client spend, and all scores that it tells in the run."""
    return [spend_over(who, plan, rounds), *scores_spend(who, plan)]


def spend_over(who: Participant, plan: Plan, rounds: int) -> PrivacySpend:
    """Return what training in ``rounds`` rounds spends, >= 1, with the noise that the run has."""
    if plan.central is not None:
        once = plan.central.spend
        return replace(once, parameters={**once.parameters, "steps": float(rounds)})
    assert who.privacy is not None
    parameters = {
        "noise_multiplier": who.privacy.noise_multiplier,
        "sample_rate": who.privacy.sample_rate,
        "steps": _steps_a_round(plan) * rounds,
    }
    return PrivacySpend("gaussian", who.privacy.unit, "add-remove", parameters)


def _steps_a_round(plan: Plan) -> int:
    """Return as how many steps of DP-SGD a round counts."""
    assert plan.config.privacy is not None
    return plan.config.privacy.steps_a_round(plan.config.local_steps or 1)


def calibrated_for(who: Participant, plan: Plan, limits: Sequence[Limit]) -> Privacy:
    """Return a client's DP-SGD for a whole run, with which it keeps within its budgets alone.

    A budget whose policy shortens runs asks for no more noise than the run does.

    Raises:
        BudgetSpent: if no noise keeps within a budget.
    """
    config = plan.config
    assert config.privacy is not None
    asked = partial(
        calibrated,
        config.privacy,
        sample_rate=min(1.0, config.batch_size / who.num_examples),
        steps=_steps_a_round(plan) * most_rounds(plan),
        besides=scores_spend(who, plan),
    )
    found = asked()
    for limit in limits:
        if _policy(limit, plan) == "shorten":
            continue
        try:
            fit = asked(history=limit.history, budget=(limit.epsilon, limit.delta))
        except (BudgetSpent, IncomposableSpends) as error:
            raise BudgetSpent(
                f"{who.name}: {limit.of(who)} cannot keep within ε = {limit.epsilon:g} (δ = "
                f"{limit.delta:g}): {error}. Raise its budget, plan fewer rounds or steps, or "
                "leave it out"
            ) from None
        found = max(found, fit, key=lambda one: one.noise_multiplier)
    return found


def central_terms(plan: Plan, budgets: Budgets) -> ClientLevel | None:
    """Return a run's client-level DP, or None where it has none.

    There is one noise for all clients: the smallest with which none spends more than the run's ε,
    and no budget is passed, in all the rounds that a client may take part in. A budget whose
    policy shortens runs asks for no more noise than the run does.

    Args:
        plan: with its participants.
        budgets: that there are.

    Raises:
        BadConfig: if δ is too large for so many clients.
        BudgetSpent: if no noise keeps within a budget, or it has spends of another unit.
    """
    config = plan.config.client_level
    if config is None:
        return None
    assert config.clip is not None
    num_clients = len(plan.participants)
    if config.delta >= 1 / num_clients:
        raise BadConfig(
            f"privacy.delta: {config.delta:g} is not below 1/{num_clients}, the number of clients "
            "that take part; choose a smaller delta"
        )
    rounds = most_rounds(plan)
    noise = config.noise_multiplier or 0.0
    asked = partial(noise_for, sample_rate=1.0, accountant=config.accountant)
    if config.epsilon is not None:
        noise = asked(config.epsilon, config.delta, steps=rounds)
        for limit, people in budgets.touched(plan):
            if _policy(limit, plan) != "shorten":
                noise = max(noise, _central_noise(limit, people, rounds, asked))
    known = roster(plan.participants, plan.config.cohort)
    expected = goal(plan.config, len(known.names))
    return ClientLevel(config.clip, noise, expected, config.clip_quantile)


def _central_noise(
    limit: Limit, people: Sequence[Participant], rounds: int, asked: Callable[..., float]
) -> float:
    """Return the smallest noise with which so many rounds of ``people`` keep within a budget.

    Raises:
        BudgetSpent: if none does, or the budget has spends of another unit.
    """
    try:
        refuse_other_kinds(limit.history, CLIENT_UNIT, ZERO_OUT)
        return asked(limit.epsilon, limit.delta, steps=rounds * len(people), history=limit.history)
    except (BudgetSpent, IncomposableSpends) as error:
        raise BudgetSpent(
            f"{people[0].name}: {limit.of(people[0])} cannot keep within ε = {limit.epsilon:g} (δ "
            f"= {limit.delta:g}): {error}. Raise its budget, plan fewer rounds, or leave it out"
        ) from None


def within_budgets(plan: Plan, budgets: Budgets) -> Plan:
    """Return the plan, with fewer rounds where budgets allow no more to any client.

    Clients of one population, or of populations that share records, spend together. Where a policy
    lets a run be shortened, those that can take part in no more rounds are left out by the ledger
    when it comes to that.

    Args:
        plan: with calibrated participants.
        budgets: that there are.

    Raises:
        BudgetSpent: if a budget has too little left, and its policy does not shorten the run.
    """
    if plan.config.privacy is None:
        return plan
    most = most_rounds(plan)
    fits = dict.fromkeys((who.name for who in plan.participants), plan.config.rounds)
    for limit, people in budgets.touched(plan):
        rounds = _rounds(limit, people, plan, most)
        if rounds == most:
            continue
        if rounds == 0 or _policy(limit, plan) != "shorten":
            raise BudgetSpent("".join(_refusal(limit, people, plan, rounds)))
        for who in people:
            fits[who.name] = min(fits[who.name], rounds)
    rounds = max(fits.values())
    if rounds == plan.config.rounds:
        return plan
    return replace(plan, config=plan.config.model_copy(update={"rounds": rounds}))


def _planned(people: Sequence[Participant], plan: Plan, rounds: int) -> list[PrivacySpend]:
    """Return what ``rounds`` rounds of all ``people`` spend."""
    return [spend for who in people for spend in spends_over(who, plan, rounds)] if rounds else []


def _rounds(limit: Limit, people: Sequence[Participant], plan: Plan, most: int) -> int:
    """Return in how many rounds, up to ``most``, all ``people`` may take part."""
    assert plan.config.privacy is not None
    # what noise was calibrated with, whose answer is known; then what the ledger goes by
    accountants: tuple[Accountant, ...] = (plan.config.privacy.accountant, "prv")

    def fits(rounds: int) -> bool:
        spends = _planned(people, plan, rounds)
        return any(limit.total(spends, by) <= limit.epsilon + _ROUNDING for by in accountants)

    if fits(most):
        return most
    low, high = 0, most  # `low` fits, if only because nothing is spent; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _policy(limit: Limit, plan: Plan) -> Policy:
    """Return what becomes of the run: ``ask`` is answered in its file."""
    assert plan.config.privacy is not None
    return (plan.config.privacy.over_budget or "ask") if limit.policy == "ask" else limit.policy


def _refusal(limit: Limit, people: Sequence[Participant], plan: Plan, rounds: int) -> Iterator[str]:
    most = most_rounds(plan)
    before, after = (limit.total(_planned(people, plan, many)) for many in (0, most))
    yield (
        f"{people[0].name}: {limit.of(people[0])} has spent ε = {before:.2f} of {limit.epsilon:g} "
        f"(δ = {limit.delta:g}), and this run would bring it to {after:.2f}. "
    )
    others = "the run more noise, raise the budget (weft privacy budget), or leave it out"
    if rounds and _policy(limit, plan) == "ask":
        yield (
            "Its policy is to ask: set privacy.over_budget: shorten, and its clients take part in "
            f"{rounds} rounds; or give {others}"
        )
    elif rounds:
        yield f"There is room for {rounds} rounds: plan as many, or give {others}"
    else:
        yield f"Give {others}"
