"""Who is asked for scores, and what it costs: exact ones if that is agreed to, noised ones charged.

Spends are on the ledger before anything is sent, as those of training are.
"""

from __future__ import annotations

import getpass
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

from clients.accounting import Accountant, noise_for
from clients.assignment import NO_DATA, Assignment, ModelSpec, Privacy
from clients.keys import data_key, destroy_key
from orchestrator.asking_sites import Asking, reaching
from orchestrator.backends.base import Backend, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.client_scores import Table, asked_of, default_bound, private_scores, table
from orchestrator.config import BadConfig
from orchestrator.gate_file import SET
from orchestrator.holding_out import registered
from orchestrator.plan import Participant
from orchestrator.relating import relate
from orchestrator.signing import admitted
from orchestrator.spending import charged
from orchestrator.suite_metrics import SUITE
from orchestrator.versions import EvaluationFailed, use
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json
from storage.ledger import Ledger
from storage.refs import did_you_mean

TIMEOUT_S = 24 * 3600.0

Who: TypeAlias = str | Mapping[str, str] | Sequence[str]
"""``all``, labels that they have, or names."""


class NotHeldOut(ValueError):
    """Clients are asked for scores that hold nothing out."""


class ScoresTell(ValueError):
    """Exact scores of data that are not public, which nobody has agreed to."""


@dataclass(frozen=True, slots=True)
class Noised:
    """Scores under differential privacy.

    Attributes:
        epsilon: of one evaluation, > 0.
        delta: in (0, 1), below one over the number of units.
        unit: whose presence is hidden: ``example``, or a column.
        bound: where losses are cut off, > 0; None for twice what guessing costs.
        accountant: that finds the noise.
        insecure_seed: replaces the clients' keys, for tests.
    """

    epsilon: float
    delta: float = 1e-5
    unit: str = "example"
    bound: float | None = None
    accountant: Accountant = "prv"
    insecure_seed: int | None = None

    def privacy(self, model: ModelSpec) -> Privacy:
        """Return how each client tells its scores."""
        noise = noise_for(
            self.epsilon, self.delta, sample_rate=1.0, steps=1, accountant=self.accountant
        )
        bound = default_bound(model) if self.bound is None else self.bound
        return private_scores(noise, self.unit, bound, self.insecure_seed)


@dataclass(frozen=True, slots=True)
class Question:
    """What clients are asked.

    Attributes:
        who: which clients.
        noised: with which privacy they tell their scores; None for exact ones.
        accepted: why exact scores of data that are not public may be told; on record for ever.
    """

    who: Who
    noised: Noised | None = None
    accepted: str | None = None

    def prefix(self, name: str) -> str:
        """Return what the metrics of its answer begin with: of the same question, the same."""
        who = self.who
        clients = who if isinstance(who, str) else dict(who) if isinstance(who, Mapping) else [*who]
        terms = None if self.noised is None else asdict(self.noised)
        facts = canonical_json({"clients": clients, "noised": terms}, "clients' scores")
        return f"{SUITE}{name}@{hashlib.sha256(facts.encode()).hexdigest()[:12]}/"


def selector(text: str) -> Who:
    """Return whom a text means: ``all``, ``region=north,tier=1`` or ``clinic-1,clinic-2``.

    Raises:
        BadConfig: if it is a mixture.
    """
    parts = [part.strip() for part in text.split(",")]
    if parts == ["all"]:
        return "all"
    if all("=" in part for part in parts):
        return dict(part.split("=", 1) for part in parts)
    if not all(parts) or any("=" in part for part in parts):
        raise BadConfig(
            "clients are all, labels such as region=north, or names such as clinic-1,clinic-2, "
            f"got {text!r}"
        )
    return parts


def chosen(people: Sequence[Participant], who: Who) -> list[Participant]:
    """Return which of some clients are asked for their scores, by name.

    Of ``all`` and of those with some labels, those that hold something out.

    Raises:
        NotHeldOut: if there are none, or one that is named holds nothing out.
        BadConfig: if one that is named is not there.
    """
    by_name = {one.name: one for one in people}
    if isinstance(who, (str, Mapping)):
        labels = {} if isinstance(who, str) else who
        found = [one for one in people if labels.items() <= one.labels.items() and one.holdout]
        if not found:
            raise NotHeldOut(
                f"no client {f'with {dict(labels)} ' if labels else ''}holds anything out; "
                "register clients with --holdout 0.1 or another data set, or set "
                "clients.simulate.holdout"
            )
        return sorted(found, key=lambda one: one.name)
    for name in who:
        if name not in by_name:
            hint = did_you_mean(name, list(by_name))
            raise BadConfig(f"no client is called {name!r}{hint}")
        if by_name[name].holdout is None:
            raise NotHeldOut(
                f"{name} holds nothing out, and scores on what it trains on say little; register "
                "it with --holdout 0.1 or another data set"
            )
    return [by_name[name] for name in sorted(set(who))]


def score(
    workspace: Workspace,
    ref: str,
    question: Question,
    model: str | None = None,
    backend: Backend | None = None,
    superlink: str | None = None,
) -> Table:
    """Return what registered clients say of a version, on what they hold out.

    Clients whose data lie at sites are asked there. Who cannot be asked is charged nothing; a site
    that was charged and does not answer keeps its charge.

    Args:
        workspace: where the version and the clients are.
        ref: the version.
        question: whom, and how they tell it.
        model: where its base model lies now, if not where it was last seen.
        backend: where to run what is not at sites; by default in this process.
        superlink: host and port by which sites are reached; by default what the environment or
            the home names.

    Raises:
        UnknownVersion, models.ModelNotFound: if one is not there.
        Unsigned: if the signature policy does not let it be loaded.
        NotHeldOut, BadConfig: as :func:`chosen`.
        ScoresTell: if exact scores tell of data that are not public.
        clients.accounting.BudgetSpent: if no noise gives so small an ε.
        EvaluationFailed: if no client told its scores, with the reasons.
    """
    version = admitted(workspace, ref)
    people = chosen([registered(one) for one in workspace.ledger.clients()], question.who)
    run = f"eval-{secrets.token_hex(6)}"
    base = replace(use(workspace, version, NO_DATA, model), run=run, round=1)
    gone = workspace.ledger.withdrawals.names()
    refused = {one.name: "it withdrew" for one in people if one.name in gone}
    people = [one for one in people if one.name not in gone]
    # a merge has no strategy
    asking = Asking((version.recipe.get("strategy") or {}).get("name", ""), ref, run, TIMEOUT_S)
    local = backend or InlineBackend()
    with reaching(workspace, people, asking, local, superlink) as (used, out_of_reach):
        refused |= out_of_reach  # nothing is spent on who cannot be asked
        people = [_in_units(one, question.noised) for one in people if one.name not in refused]
        return _told(workspace, base, people, question, used, refused)


def _told(
    workspace: Workspace,
    base: Assignment,
    people: Sequence[Participant],
    question: Question,
    backend: Backend,
    refused: Mapping[str, str],
) -> Table:
    """Ask clients, whatever it costs them; those who are not asked are in the table, too."""
    noised, run = question.noised, base.run
    if noised is None:
        refuse_exact(people, workspace.ledger, run, question.accepted)
        return _answered(backend, asked_of(base, people, {}), refused)
    check_noised(people, noised, workspace.ledger, run)
    relate(people, base.model, workspace.ledger, workspace.sites)
    told = noised.privacy(base.model)
    data_key(workspace.sites)  # by which a spend knows its site: before the first
    asked = asked_of(base, people, {one.name: told for one in people})
    over = charged(asked, {one.name: one.population for one in people}, workspace.ledger)
    why = {**refused, **{client: str(error) for client, error in over.items()}}
    try:
        return _answered(backend, [one for one in asked if one.client not in over], why)
    finally:  # nobody can ever compute the noise again
        for one in people:
            destroy_key(workspace.sites, run, one.name)


def refuse_no_name(name: str) -> None:
    """Refuse what cannot be the name of a data set of a suite.

    Raises:
        BadConfig: saying what can.
    """
    if not SET.fullmatch(name):
        raise BadConfig(
            f"--name: a data set is called by 1 to 31 of a-z, 0-9, '_' and '-', got {name!r}"
        )


def keep(workspace: Workspace, ref: str, name: str, question: Question, found: Table) -> None:
    """Keep clients' scores with the version, as those on a data set of a suite are kept."""
    begins = question.prefix(name)
    values = {**found.metrics, "num_examples": found.num_examples}
    workspace.store.record_metrics(
        workspace.store.version(ref).id, {begins + key: value for key, value in values.items()}
    )


def _answered(backend: Backend, asked: Sequence[Assignment], refused: Mapping[str, str]) -> Table:
    found = table(list(complete(backend, asked, TIMEOUT_S, lambda one: None)), asked, refused)
    if not any(row.scores or not row.reason for row in found.rows):
        why = "; ".join(f"{client}: {reason}" for client, reason in found.failed.items())
        raise EvaluationFailed(f"no client told its scores ({why})")
    return found


def _in_units(who: Participant, noised: Noised | None) -> Participant:
    """Return a client whose holdout says whose each example is, where that is hidden."""
    if noised is None or noised.unit == "example" or who.holdout is None:
        return who
    return replace(who, holdout=replace(who.holdout, unit=noised.unit))


def refuse_exact(
    people: Sequence[Participant], ledger: Ledger, run: str, accepted: str | None
) -> None:
    """Refuse exact scores of data that are not public, or put on record why they are told.

    Raises:
        ScoresTell: naming a client.
    """
    secret = [one for one in people if not one.public]
    if secret and accepted is None:
        raise ScoresTell(
            f"{secret[0].name}: what a model scores on data tells of them, and no ε would count "
            "it; give --epsilon, or if their owners agree that nothing bounds what is told: "
            "--accept-unbounded --reason WHY"
        )
    if secret:
        populations = {one.population for one in secret}
        ledger.unprotected.add(run, populations, accepted or "", getpass.getuser())


def check_noised(people: Sequence[Participant], noised: Noised, ledger: Ledger, run: str) -> None:
    """Refuse privacy that means nothing, or is none.

    Raises:
        BadConfig: if δ is too large for a client, or an insecure seed meets a budget.
    """
    budgets = ledger.budgets()
    for one in people:
        if one.num_examples and noised.delta >= 1 / one.num_examples:
            raise BadConfig(
                f"--delta: {noised.delta:g} is not below 1/{one.num_examples}, the size of "
                f"{one.name}; choose a smaller delta"
            )
        related = {one.population, *ledger.relations.of(one.population)}
        if noised.insecure_seed is not None and related & budgets.keys():
            raise BadConfig(
                f"{one.name}: insecure_seed gives no privacy, and its data have a budget; leave "
                "insecure_seed out"
            )
    if noised.insecure_seed is not None:
        populations = {one.population for one in people if not one.public}
        ledger.unprotected.add(run, populations, "insecure_seed", getpass.getuser())
