"""What scores that clients tell in a run do not go with, and with which noise they are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.policy import TRAIN_LOSS
from strategies.pooled import COUNT, kinds
from strategies.spends import PrivacySpend

if TYPE_CHECKING:
    from clients.assignment import ModelSpec
    from orchestrator.config import RunConfig
    from orchestrator.plan import Participant, Plan
    from storage.ledger import SpendRow


def problems(config: RunConfig) -> Iterable[str]:
    """Yield a sentence for each rule of a run that its clients' scores do not go with."""
    asked = config.evaluate
    if asked is None or asked.clients is None:
        return
    if config.stale is not None:
        yield (
            "evaluate.clients: with late: keep or asynchronous a client may still train while it "
            "is asked for scores; leave them out, or give evaluate.data"
        )
    if config.client_level:
        yield (
            "evaluate.clients: what clients tell of examples cannot be added to what "
            "privacy.level: client spends; give evaluate.data"
        )
    if config.privacy is None and asked.epsilon is not None:
        yield "evaluate.epsilon: without privacy training has no ε to share; leave it out"
    if config.dp_sgd is not None:
        yield from _private_problems(config, config.dp_sgd.epsilon, asked.epsilon)


def _private_problems(config: RunConfig, whole: float | None, own: float | None) -> Iterable[str]:
    if own is None:
        yield (
            "evaluate.epsilon: under privacy clients tell scores in noise that costs; say how much "
            "of privacy.epsilon all of the run's evaluations may spend"
        )
    elif whole is not None and own >= whole:
        yield (
            f"evaluate.epsilon: {own:g} leaves nothing of privacy.epsilon ({whole:g}) for "
            "training; give a smaller one"
        )
    told = [name for name in kinds(config.task) if name != COUNT]
    judged = config.stop is not None or config.select == "best"
    if judged and config.judge.metric not in (*told, TRAIN_LOSS):
        yield (
            f"stop.metric: {config.judge.metric} is not among what clients tell under privacy "
            f"({', '.join(told)}); choose one of these"
        )


def with_scoring(
    people: Sequence[Participant], config: RunConfig, model: ModelSpec
) -> list[Participant]:
    """Return a run's participants with the noise in which they tell their scores, if they do.

    All evaluations of the run together cost each of them ``evaluate.epsilon``.

    Raises:
        NotHeldOut: if who is asked holds nothing out.
        BadConfig: if who is named takes no part.
        clients.accounting.BudgetSpent: if no noise gives so small an ε.
    """
    from clients.accounting import noise_for
    from orchestrator.asking_clients import chosen
    from orchestrator.client_scores import default_bound, private_scores

    asked, privacy = config.evaluate, config.dp_sgd
    if asked is None or asked.clients is None:
        return list(people)
    names = {who.name for who in chosen(people, asked.clients)}
    if privacy is None or asked.epsilon is None:
        return list(people)
    noise = noise_for(
        asked.epsilon,
        privacy.delta,
        sample_rate=1.0,
        steps=asked.times(config.rounds),
        accountant=privacy.accountant,
    )
    bound = default_bound(model) if asked.loss is None else asked.loss
    told = private_scores(noise, privacy.unit, bound, privacy.insecure_seed)
    return [replace(who, scoring=told) if who.name in names else who for who in people]


def is_of_scores(row: SpendRow, plan: Plan) -> bool:
    """Return whether a spend of a run is what a client's scores cost, and not its training."""
    scoring = {who.name: who.scoring for who in plan.participants}.get(row.client)
    if scoring is None:
        return False
    found = (row.parameters["noise_multiplier"], row.parameters["sample_rate"])
    return found == (scoring.noise_multiplier, 1.0) and row.parameters["steps"] == 1.0


def most_scores(plan: Plan, rows: Sequence[SpendRow], done: int, total: int) -> int:
    """Return how often some client tells its scores in a run that is to have more rounds.

    A round that was the last of fewer was scored, whether it was its turn or not.

    Args:
        plan: the run's.
        rows: its spends so far.
        done: the last round that is done, >= 0.
        total: how many there are to be.
    """
    asked = plan.config.evaluate
    if asked is None or asked.epsilon is None:
        return 0
    to_come = {one for one in range(max(done, 1), total + 1) if asked.due(one, total)}
    told: dict[str, set[int]] = {who.name: set() for who in plan.participants if who.scoring}
    for row in rows:
        if is_of_scores(row, plan):
            told[row.client].add(row.round)
    return max((len(rounds | to_come) for rounds in told.values()), default=0)


def scores_spend(who: Participant, plan: Plan) -> tuple[PrivacySpend, ...]:
    """Return what all scores of a client in a run cost it, at most; nothing where it tells none."""
    asked = plan.config.evaluate
    if who.scoring is None or asked is None:
        return ()
    parameters = {
        "noise_multiplier": who.scoring.noise_multiplier,
        "sample_rate": 1.0,
        "steps": float(asked.times(plan.config.rounds)),
    }
    return (PrivacySpend("gaussian", who.scoring.unit, "add-remove", parameters),)
