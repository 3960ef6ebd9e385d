"""What a run would spend of people's privacy, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from clients.accounting import Accountant, approximate_epsilon, epsilon
from orchestrator.budgets import Budgets, Limit, most_rounds, spend_over, spends_over
from orchestrator.config import BadConfig, RunConfig
from orchestrator.epsilons import Epsilon, against_coordinator, composed
from orchestrator.launch import make_plan
from orchestrator.plan import Participant, Plan
from orchestrator.precedents import Precedent, precedents
from orchestrator.score_rules import scores_spend
from orchestrator.workspace import Workspace
from strategies.spends import PrivacySpend


@dataclass(frozen=True, slots=True)
class Effect:
    """What a run brings a budget to.

    Attributes:
        population: whose budget.
        limit: ε that it may spend in all.
        delta: of it.
        before: ε that is spent.
        after: ε that will be, with all of the run's clients that it counts.
    """

    population: str
    limit: float
    delta: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a run would spend of one client's population.

    Attributes:
        client: its name.
        num_examples: its declared size, in units.
        noise_multiplier: noise standard deviation over the clipping norm.
        sample_rate: with which a step takes a unit.
        steps: in a round.
        rounds: in which it takes part, at most.
        one_round: the ε of one of them.
        whole: the ε of all of them, of this run alone.
        by_accountant: the same by ``prv`` and ``rdp``, upper bounds, and by ``gdp``, which is an
            approximation and may be too low: nothing is judged by it.
        against_coordinator: with ``noise_shares``, the ε of its single updates, each with its share
            of the noise alone; else None.
    """

    client: str
    num_examples: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    rounds: int
    one_round: Epsilon
    whole: Epsilon
    by_accountant: Mapping[str, float]
    against_coordinator: Epsilon | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would spend.

    Attributes:
        name: the run's.
        asked_rounds: as its file says.
        rounds: that it would have; fewer where a budget's policy shortens it.
        clients: what each would spend.
        budgets: what each budget that it touches comes to.
        precedents: what runs of the same task reached in this home, with their privacy.
    """

    name: str
    asked_rounds: int
    rounds: int
    clients: tuple[Prospect, ...]
    budgets: tuple[Effect, ...]
    precedents: tuple[Precedent, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return asdict(self)


def forecast(workspace: Workspace, config: RunConfig) -> Forecast:
    """Return what a run would spend; plans it as launching would, and starts nothing.

    Raises:
        BadConfig: if it cannot be run, or has no privacy to speak of.
        BudgetSpent: if a budget has too little left.
    """
    if config.privacy is None:
        raise BadConfig(
            f"{config.name} has no privacy section: no ε bounds what it tells; add one, such as "
            "--set privacy.epsilon=3"
        )
    plan = make_plan(config, workspace.store, workspace.ledger, workspace.sites)
    return Forecast(
        name=config.name,
        asked_rounds=config.rounds,
        rounds=plan.config.rounds,
        clients=tuple(_prospect(who, plan) for who in plan.participants),
        budgets=tuple(_effect(*one, plan) for one in Budgets(workspace.ledger).touched(plan)),
        precedents=precedents(workspace, plan.config),
    )


def _prospect(who: Participant, plan: Plan) -> Prospect:
    privacy, rounds = plan.config.privacy, most_rounds(plan)
    assert privacy is not None
    shares = privacy.noise_shares
    spends = [spend_over(who, plan, many) for many in (1, rounds)]
    told = scores_spend(who, plan)
    one, whole = (
        composed(who.population, parts, privacy.delta, privacy.accountant, who.public)
        for parts in (spends[:1], [spends[1], *told])
    )
    numbers = spends[0].parameters
    return Prospect(
        who.name,
        who.num_examples,
        float(numbers["noise_multiplier"]),
        float(numbers["sample_rate"]),
        int(numbers["steps"]),
        rounds,
        one,
        whole,
        _by_accountant([spends[1], *told], privacy.delta),
        against_coordinator(who.population, spends[1:], [shares], privacy.delta)
        if shares
        else None,
    )


def _by_accountant(spends: Sequence[PrivacySpend], delta: float) -> dict[str, float]:
    bounds = {name: epsilon(spends, delta, name) for name in get_args(Accountant)}
    return {**bounds, "gdp": approximate_epsilon(spends, delta)}


def _effect(limit: Limit, people: Sequence[Participant], plan: Plan) -> Effect:
    rounds = most_rounds(plan)
    after = limit.total([s for who in people for s in spends_over(who, plan, rounds)])
    return Effect(limit.population, limit.epsilon, limit.delta, limit.total(()), after)
