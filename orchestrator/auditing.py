"""An audit: what an attack on a run's privacy finds, beside the ε that is claimed.

The *white-box* attack is :mod:`clients.canaries`', on the steps that one client of the run makes:
with its noise, sample rate, clipping and trained tensors, and over all its rounds; or, where whole
clients are hidden, :mod:`orchestrator.client_canaries`', on the sums of those rounds. It reads
nobody's data, so that nothing is spent, and anybody may audit a run on anybody's data. The
*black-box* one (:mod:`orchestrator.planting`) makes the whole run, on public data with canaries
among them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from clients.assignment import Assignment
from clients.canaries import refuse_senseless, white_box
from clients.keys import new_key
from clients.noise import insecure_key
from clients.one_run import Guesses, lower_bound
from clients.starting import initial_update
from orchestrator.beginning import rehearse
from orchestrator.budgets import most_rounds, spend_over
from orchestrator.central import Central
from orchestrator.client_canaries import attack_sums
from orchestrator.config import BadConfig, RunConfig, load_config
from orchestrator.coordinator import planned
from orchestrator.epsilons import Epsilon, composed
from orchestrator.launch import make_plan
from orchestrator.plan import Participant, Plan, RoundInputs, plan_round
from orchestrator.sections import PrivacyConfig
from orchestrator.workspace import Workspace
from storage.refs import did_you_mean
from strategies import STRATEGIES
from strategies.base import Strategy
from strategies.spends import CLIENT_UNIT

RECORDED = "audit/"
"""What the names of an audit's metrics begin with."""


@dataclass(frozen=True, slots=True)
class Attack:
    """How a run is attacked; all of it is declared before anything is seen.

    Attributes:
        canaries: how many, >= 1; the more, the more can be proved.
        guesses: of how many coins a guess is made; None for an eighth of the canaries.
        client: whose privacy (white box); None for that of the client with the largest claim.
        delta: at which ε is claimed and bounded; None for the run's.
        confidence: that the bound is right, in [0.5, 1).
    """

    canaries: int = 1000
    guesses: int | None = None
    client: str | None = None
    delta: float | None = None
    confidence: float = 0.95

    @property
    def made(self) -> int:
        """Of how many coins a guess is made."""
        return max(1, self.canaries // 8) if self.guesses is None else self.guesses


@dataclass(frozen=True, slots=True)
class Audit:
    """What an attack found.

    Attributes:
        name: the run's.
        client: whose privacy was attacked.
        claim: the ε of all its rounds.
        bound: the ε that the guesses prove, >= 0.
        confidence: that it is no larger than the true ε.
        guesses: what was guessed, and right.
        sample_rate: with which a step took a canary.
        white_box: whether canaries were gradients in its steps; else examples in a whole run.
        version: id of the version it is recorded on, or None.
    """

    name: str
    client: str
    claim: Epsilon
    bound: float
    confidence: float
    guesses: Guesses
    sample_rate: float
    white_box: bool = True
    version: str | None = None

    @property
    def kind(self) -> str:
        """What the canaries are."""
        if not self.white_box:
            return "mislabelled examples"
        return "canary clients" if self.claim.unit == CLIENT_UNIT else "gradient canaries"

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true, but by a chance of 1 - confidence."""
        return self.bound > self.claim.epsilon

    @property
    def metrics(self) -> dict[str, float]:
        """What is recorded on a version; an infinite claim is not."""
        found = {
            "epsilon_at_least": self.bound,
            "epsilon_claimed": self.claim.epsilon,
            "delta": self.claim.delta,
            "confidence": self.confidence,
            "canaries": float(self.guesses.canaries),
            "guesses": float(self.guesses.made),
            "right": float(self.guesses.right),
        }
        return {RECORDED + name: value for name, value in found.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {**asdict(self), "kind": self.kind, "refuted": self.refuted}


def audit_config(
    workspace: Workspace, path: Path, attack: Attack, overrides: Iterable[str] = ()
) -> Audit:
    """Audit what a run's file asks for; it is planned as launching would, and not started.

    Args:
        workspace: where.
        path: of the file.
        attack: how.
        overrides: of the file, as ``KEY.PATH=VALUE``.

    Raises:
        BadConfig: if it cannot be run, or has no privacy.
        clients.canaries.NoPlaceForCanaries: if it trains fewer numbers than canaries.
    """
    config = load_config(path, overrides)
    plan = make_plan(config, workspace.store, workspace.ledger, workspace.sites)
    return audit(workspace, plan, attack)


def audit_run(workspace: Workspace, run: str, attack: Attack) -> Audit:
    """Audit a run as it was planned, and record what is found on its newest version.

    Args:
        workspace: where the run is.
        run: id, prefix or name.
        attack: how.

    Raises:
        UnknownRun: if there is no such run.
        BadConfig, clients.canaries.NoPlaceForCanaries: as :func:`audit_config`.
    """
    record = workspace.ledger.run(run)
    found = audit(workspace, planned(workspace.ledger, record), attack)
    if record.version is None:
        return found
    workspace.store.record_metrics(record.version, found.metrics)
    return replace(found, version=record.version)


def audit(workspace: Workspace, plan: Plan, attack: Attack) -> Audit:
    """Attack what is released of one client in a plan's rounds, and return what that proves.

    Raises:
        BadConfig: if the plan has no privacy, or no such client.
        clients.canaries.NoPlaceForCanaries: if it trains fewer numbers than canaries.
        clients.one_run.BadGuesses: if the attack is senseless.
    """
    privacy = plan.config.privacy
    if privacy is None:
        raise _nothing_hidden(plan.config)
    refuse_senseless(attack.canaries, attack.made)
    delta = privacy.delta if attack.delta is None else attack.delta
    who, claim = claimed(plan, attack.client, delta)
    seed, rounds = privacy.insecure_seed, most_rounds(plan)
    key = new_key() if seed is None else insecure_key(seed, "audit")
    with tempfile.TemporaryDirectory(prefix="weft-audit-") as scratch:
        asked = _asked(workspace, plan, who, scratch)
        if plan.central is not None:
            central = Central(plan.central, plan.run, Path(scratch), seed)
            guesses = attack_sums(central, asked, rounds, attack.canaries, attack.made, key)
        else:
            whole = replace(asked, steps=(asked.steps or 1) * rounds)
            guesses = white_box(whole, attack.canaries, attack.made, key)
    bound = lower_bound(guesses, delta, attack.confidence)
    rate = who.privacy.sample_rate if who.privacy else 1.0
    return Audit(plan.config.name, who.name, claim, bound, attack.confidence, guesses, rate)


def _asked(workspace: Workspace, plan: Plan, who: Participant, site: str) -> Assignment:
    """Return what a client is asked in round 1: what is released along a canary of its is constant.

    Nothing is committed.
    """
    choice = plan.strategy
    strategy: Strategy = STRATEGIES.get(choice.name).build(**choice.options)
    begun = rehearse(plan, workspace.store, strategy, initial_update, site)
    inputs = RoundInputs(1, begun.version, {}, {}, site)
    [asked] = plan_round(plan, inputs, partial(strategy.broadcast, begun.state), [who])
    return asked


def hiding_examples(config: RunConfig) -> PrivacyConfig:
    """Return the privacy of a run that hides examples.

    Raises:
        BadConfig: if it hides none.
    """
    if config.privacy is None:
        raise _nothing_hidden(config)
    if config.dp_sgd is None:
        raise BadConfig(
            f"a black-box audit's canaries are examples, and {config.name} hides whole clients; "
            "audit it by --white-box"
        )
    return config.dp_sgd


def _nothing_hidden(config: RunConfig) -> BadConfig:
    return BadConfig(
        f"{config.name} has no privacy section, so that there is no claim to audit; add one, such "
        "as --set privacy.epsilon=3"
    )


def claimed(plan: Plan, client: str | None, delta: float) -> tuple[Participant, Epsilon]:
    """Return whose privacy is attacked, and what is claimed of it.

    Raises:
        BadConfig: if there is no such client.
    """
    people = {who.name: who for who in plan.participants}
    if client is not None and client not in people:
        hint = did_you_mean(client, list(people)) or f"; they are {', '.join(list(people)[:5])} …"
        raise BadConfig(f"no client of {plan.config.name} is called {client!r}{hint}")
    assert plan.config.privacy is not None
    accountant = plan.config.privacy.accountant
    most = most_rounds(
        plan
    )  # of training: scores that clients tell are no part of what is attacked
    claims = {
        name: composed(who.population, [spend_over(who, plan, most)], delta, accountant, who.public)
        for name, who in people.items()
        if client in (None, name)
    }
    name = max(claims, key=lambda one: claims[one].epsilon)  # the first of equals
    return people[name], claims[name]
