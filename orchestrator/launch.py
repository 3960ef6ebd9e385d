"""From a config to a plan: everything that can be wrong is found before anything starts."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from clients import data, models
from clients.adapters import ADAPTERS
from clients.assignment import DataSpec, ModelSpec
from clients.inspection import rounded
from clients.regularizers import rehearses
from orchestrator.budgets import (
    Budgets,
    Coming,
    Limit,
    calibrated_for,
    central_terms,
    check_limits,
    within_budgets,
)
from orchestrator.config import BadConfig, RunConfig
from orchestrator.gate_setting import owners_of
from orchestrator.growing import is_beginning
from orchestrator.holding_out import holding_out, left, refuse_split_units, registered
from orchestrator.library import refuse_useless, resolved
from orchestrator.merging import adapter_of, refuse_kept, refuse_offset, refuse_personal
from orchestrator.nodes import units_of
from orchestrator.plan import Participant, Plan, Start
from orchestrator.ranks import rank_of
from orchestrator.refusals import refuse_impossible_rounds, refuse_senseless
from orchestrator.rehearsed import with_past
from orchestrator.relating import relate_planned
from orchestrator.score_rules import with_scoring
from orchestrator.sections import RankRule, Simulate
from orchestrator.weighing import weighed, weighing_label
from storage.ledger import Ledger
from storage.lineage import Version
from storage.refs import did_you_mean
from storage.store import AdapterStore


def make_plan(
    config: RunConfig,
    store: AdapterStore,
    ledger: Ledger,
    sites: Path | None = None,
    coming: Coming | None = None,
) -> Plan:
    """Return the plan of a new run; reads data sizes and weights' hashes, trains nothing.

    Args:
        config: what to run.
        store: the versions it may start from.
        ledger: the clients, their budgets and what was spent.
        sites: folder of the clients' private state, where it is looked up whose data share records;
            None plans by what the ledger knows.
        coming: what will be spent before it, besides what is on the ledger.

    Raises:
        BadConfig: if the config cannot be run, with the reason.
        clients.models.ModelNotFound: if the base model is not there.
        clients.data.DataNotFound: if a simulated data set is not there.
        BudgetSpent: if a client's population has no budget left for it.
    """
    chosen = config.checked_plugins()
    config = anchored(config)
    model = config.model_spec()
    model = replace(model, hash=models.base_hash(model))
    start = _start(config, model, store)
    plan = Plan(
        run=secrets.token_hex(6),
        config=config,
        model=model,
        participants=(),
        start=start,
        library=resolved(config.library, model, store),
        **chosen,
    )
    refuse_senseless(plan)
    refuse_useless(plan, store)
    participants = _participants(config, model, ledger)
    if not participants:
        raise BadConfig("clients: nobody takes part; weft clients list shows who is registered")
    _refuse_faults_of_nobody(config, [p.name for p in participants])
    _refuse_unreachable(config, participants)
    _refuse_scoring_private(config, [p.name for p in participants], ledger)
    participants = [_in_units(who, plan, ledger) for who in _ranked(config, participants)]
    participants = with_scoring(participants, config, model)
    label = weighing_label(plan.strategy.options)
    if sites is not None:
        relate_planned(replace(plan, participants=tuple(participants)), ledger, sites)
    budgets = Budgets(ledger, coming)
    private = [
        _with_privacy(weighed(p, label), plan, budgets.on(p.population)) for p in participants
    ]
    plan = replace(plan, participants=tuple(sorted(private, key=lambda p: p.name)))
    plan = with_past(plan, store, budgets)
    plan = replace(plan, central=central_terms(plan, budgets))
    plan = within_budgets(plan, budgets)
    refuse_impossible_rounds(plan)
    return plan


def _refuse_faults_of_nobody(config: RunConfig, names: Sequence[str]) -> None:
    asked = [fault.client for fault in config.faults.at] if config.faults else []
    unknown = [client for client in asked if client is not None and client not in names]
    if unknown:
        hint = did_you_mean(unknown[0], names) or f"; they are {', '.join(names[:5])} …"
        raise BadConfig(f"faults: no client is called {unknown[0]!r}{hint}")


def _refuse_unreachable(config: RunConfig, participants: Sequence[Participant]) -> None:
    """Refuse to look here for data that lie at their sites.

    Raises:
        BadConfig: naming a client that no worker of the backend could train.
    """
    away = [p.name for p in participants if data.is_elsewhere(p.data.uri)]
    if away and config.backend.name in ("inline", "ray"):
        raise BadConfig(
            f"backend: {config.backend.name} trains where data can be read, and those of {away[0]} "
            f"({len(away)} of {len(participants)} clients) lie at their sites; use backend: "
            "superlink, or leave them out"
        )


def _ranked(config: RunConfig, participants: Sequence[Participant]) -> list[Participant]:
    """Return the participants with their ranks.

    Raises:
        BadConfig: if a rule is the first for nobody: a label or name is then mistyped, or hidden.
    """
    ranked = [replace(p, rank=rank_of(config.ranks, p.name, p.labels)) for p in participants]
    for index, rule in enumerate(config.ranks):
        before = config.ranks[:index]
        if not any(
            rule.fits(p.name, p.labels) and rank_of(before, p.name, p.labels) is None
            for p in participants
        ):
            raise BadConfig(
                f"ranks: no client that takes part is the first to fit {_described(rule)}; the "
                "first rule that fits counts, and weft clients list shows the labels"
            )
    return ranked


def _refuse_scoring_private(config: RunConfig, names: Sequence[str], ledger: Ledger) -> None:
    """Refuse to score versions on a client's own data: no ε counts what that tells of them.

    Raises:
        BadConfig: naming the client, unless it takes part in a run that is to bound nothing.
        clients.data.DataNotFound: if somebody has private data, and these are not there.
    """
    asked = config.evaluate
    if asked is None or asked.data is None or all(c.public for c in ledger.clients()):
        return
    owner = owners_of({"evaluate": asked.data}, ledger).get("evaluate")
    if owner is not None and not (config.accept_unbounded and owner in names):
        raise BadConfig(
            f"evaluate.data: {asked.data} has the data of client {owner!r}, and scores on them "
            "tell of them without being counted in any ε; ask clients with evaluate.clients, give "
            "data that were held back for this, or register the client with --public if they are"
        )


def _described(rule: RankRule) -> str:
    if rule.names:
        return f"names {', '.join(rule.names)}"
    return f"where {', '.join(f'{k}={v}' for k, v in rule.where.items())}"


def anchored(config: RunConfig) -> RunConfig:
    """Return a config with absolute paths: a run may be driven, or cloned, from elsewhere.

    Raises:
        BadConfig: if what the coordinator must read lies at a site.
    """
    for key in ("evaluate", "init_data"):
        section = getattr(config, key)
        if section is not None and section.data and data.is_elsewhere(section.data):
            raise BadConfig(
                f"{key}.data: {section.data} lies at a site, and is read here; name data that are "
                "here"
            )
    moved: dict[str, BaseModel] = {
        key: section.model_copy(update={"data": data.absolute(section.data)})
        for key in ("evaluate", "init_data")
        if (section := getattr(config, key)) is not None and section.data
    }
    if Path(config.model.id).is_dir():
        place = {"id": str(Path(config.model.id).absolute())}
        moved["model"] = config.model.model_copy(update=place)
    if (simulate := config.clients.simulate) is not None:
        there = simulate.model_copy(update={"data": data.absolute(simulate.data)})
        moved["clients"] = config.clients.model_copy(update={"simulate": there})
    return config.model_copy(update=moved)


def _start(config: RunConfig, model: ModelSpec, store: AdapterStore) -> Start:
    if config.start_from is None:
        return Start()
    version = store.version(config.start_from)
    refuse_offset(version)
    refuse_kept(version)
    recipe = version.recipe
    theirs = recipe["model"]
    if theirs["hash"] != model.hash:
        raise BadConfig(
            f"start_from: {config.start_from} was trained on base model {theirs['hash'][:12]} "
            f"({theirs['id'] or 'a local folder'}), this run has {model.hash[:12]} ({model.id}); "
            "an adapter fits no other base"
        )
    labels = tuple(theirs["labels"])
    if not is_beginning(labels, model.labels):
        raise BadConfig(
            f"labels: {config.start_from} has the label set {list(labels)}, this run "
            f"{list(model.labels)}; declare the same set, or one that begins with it, and choose "
            "this run's with task_labels"
        )
    if config.start == "continue":
        _refuse_other_adapter(config, model, version, store)
    if config.start == "fresh":  # its memory goes on; its adapter and head do not
        kept = any(rehearses(one.name, one.options) for one in config.regularizers)
        learned = tuple(recipe["seen_labels"]) if kept else ()  # anew, from what clients kept
        return Start("fresh", version.id, seen_labels=learned, labels=labels)
    stack = tuple(recipe["stack"])
    if config.start == "stack":
        refuse_personal(version)
        _refuse_beneath(config.start_from, version)
        stack = (*stack, version.id)
    offset = recipe.get("offset") if config.start == "continue" else None
    return Start(config.start, version.id, stack, tuple(recipe["seen_labels"]), offset, labels)


def _refuse_beneath(ref: str, version: Version) -> None:
    """Refuse to lay an adapter under another that is more than a product B A.

    Raises:
        BadConfig: naming its method.
    """
    if "low-rank" not in adapter_of(version).capabilities:
        raise BadConfig(
            f"start_from: {ref} is a {version.recipe['adapter']['name']} adapter (as set), which "
            "is not a plain product B A, and only such can lie under another; use start: continue"
        )


def _refuse_other_adapter(
    config: RunConfig, model: ModelSpec, version: Version, store: AdapterStore
) -> None:
    """Refuse to go on with tensors that are not the configured adapter's.

    Raises:
        BadConfig: if the version has another adapter, or lacks one of its tensors.
    """
    ours, theirs = config.adapter.checked("adapter"), version.recipe["adapter"]
    plugin = ADAPTERS.get(ours.name)
    # a recipe may be older than an option, which then has its default
    if theirs["name"] != ours.name or plugin.check(theirs["options"]) != ours.options:
        raise BadConfig(
            f"adapter: {config.start_from} is {theirs}; start: continue goes on with "
            "the same adapter; start: stack puts a new one on top"
        )
    wanted = _parts(models.shapes(model, plugin.build(**ours.options)))
    lacking = sorted(wanted - _parts(store.tensors(version.id)))
    if lacking:
        raise BadConfig(
            f"adapter: {config.start_from} is a merge into plain factors, and {ours.name} also has "
            f"{lacking[0]}; start: stack puts a new one on top"
        )


def _parts(names: Iterable[str]) -> set[str]:
    """Return what an adapter's layers are made of, such as ``lora_A``."""
    return {found[1] for name in names if (found := re.search(r"\.(lora_[A-Za-z]+)", name))}


def _participants(config: RunConfig, model: ModelSpec, ledger: Ledger) -> list[Participant]:
    clients = config.clients
    if clients.simulate is not None:
        return _simulated(clients.simulate, config, model)
    if clients.names is not None:
        records = [ledger.client(name) for name in clients.names]
    else:
        records = ledger.clients(clients.select or {})
    return [registered(record) for record in records]


def _simulated(simulate: Simulate, config: RunConfig, model: ModelSpec) -> list[Participant]:
    uri = data.absolute(simulate.data)
    base = DataSpec(uri, simulate.fields, labels=config.task_labels)
    parts = data.partition_specs(
        base,
        simulate.by,
        parts=simulate.parts or 1,
        alpha=simulate.alpha,
        column=simulate.column or "",
        seed=simulate.seed,
        model=model,
    )
    public = simulate.public or data.is_public(simulate.data)
    files = [data.parse_uri(part).path for part in data.parts_of(simulate.data)]
    source = "+".join(Path(file).name for file in files)  # recipes hold no paths
    # otherwise nobody needs a size before the round, and each part is a pass over the data
    sized = config.dp_sgd is not None or config.cohort.weight == "examples"
    found: list[Participant] = []
    taken: set[str] = set()
    for name, spec in parts:
        slug = _slug(name, taken)
        taken.add(slug)
        size = len(data.examples(spec, model)) if sized else 0
        who = Participant(slug, spec, f"{source}#{name}", size, public=public)
        found.append(holding_out(who, simulate.holdout))
    return found


def _in_units(who: Participant, plan: Plan, ledger: Ledger) -> Participant:
    """Return a participant whose size is in units, where the run's privacy is not per example.

    Of a registered client it is rounded, as its number of examples is; one at a site declares it.

    Raises:
        BadConfig: if its data are not here, or do not say whose each example is.
    """
    column = plan.config.privacy.unit_column if plan.config.privacy else ""
    if not column:
        return who
    refuse_split_units(who, column)
    spec = replace(who.data, unit=column)
    declared = units_of(ledger, who.name, column) if data.is_elsewhere(spec.uri) else None
    if declared is not None:
        held = replace(who.holdout, unit=column) if who.holdout else None
        return replace(who, data=spec, num_examples=declared, holdout=held)
    if not data.is_there(spec.uri):
        raise BadConfig(
            f"{who.name}: privacy.unit: {column} needs the number of its units, and its data "
            "cannot be looked at from here; leave it out, or the unit"
        )
    whole = replace(spec, part="all", holdout=0.0, holdout_by="")
    try:
        size = left(len(data.units(data.examples(whole, plan.model))), spec.holdout)
    except data.BadRecord as error:
        raise BadConfig(f"privacy.unit: {who.name}: {error}") from None
    simulated = plan.config.clients.simulate is not None
    held = replace(who.holdout, unit=column) if who.holdout else None
    number = size if simulated else rounded(size)
    return replace(who, data=spec, num_examples=number, holdout=held)


def _slug(value: str, taken: Collection[str]) -> str:
    """Return a client's name made from a column's value, of which no other is made."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", value.lower())[:64].strip("-._") or "part"
    made, number = slug, 1
    while made in taken:
        number += 1
        made = f"{slug}-{number}"
    return made


def _with_privacy(who: Participant, plan: Plan, limits: Sequence[Limit]) -> Participant:
    """Return the participant with its noise calibrated, or as it is in a run without DP.

    Raises:
        BadConfig: if a budget is touched and the run has no privacy.
        BudgetSpent: if no noise keeps within the budgets.
    """
    config = plan.config
    check_limits(who, plan, limits)
    if config.privacy is None:
        return who
    if config.client_level:
        return who  # one noise for all: see central_terms
    if who.num_examples < 1:
        raise BadConfig(
            f"{who.name}: privacy needs its declared number of examples; register it with "
            "--examples N"
        )
    if config.privacy.delta >= 1 / who.num_examples:
        raise BadConfig(
            f"privacy.delta: {config.privacy.delta:g} is not below 1/{who.num_examples}, the "
            f"size of {who.name}; choose a smaller delta"
        )
    return replace(who, privacy=calibrated_for(who, plan, limits))
