"""From a config to a plan: everything that can be wrong is found before anything starts."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from clients import data, models
from clients.accounting import BudgetSpent
from clients.adapters import ADAPTERS, Adapter
from clients.assignment import DataSpec, ModelSpec, Privacy
from clients.optimizers import OPTIMIZERS
from clients.regularizers import REGULARIZERS, Regularizer
from orchestrator.cohort import quorum, roster
from orchestrator.config import BadConfig, RunConfig, Simulate
from orchestrator.plan import Participant, Plan, Start
from orchestrator.spending import calibrated, spend_from_row
from storage.ledger import ClientRecord, Ledger
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import ClientSpec


def make_plan(config: RunConfig, store: AdapterStore, ledger: Ledger) -> Plan:
    """Return the plan of a new run; reads data sizes and weights' hashes, trains nothing.

    Raises:
        BadConfig: if the config cannot be run, with the reason.
        clients.models.ModelNotFound: if the base model is not there.
        clients.data.DataNotFound: if a simulated data set is not there.
        BudgetSpent: if a client's population has no budget left for it.
    """
    chosen = config.checked_plugins()
    config = _anchored(config)
    model = config.model_spec()
    if Path(model.id).is_dir():
        model = replace(model, id=str(Path(model.id).absolute()))
    model = replace(model, hash=models.base_hash(model))
    start = _start(config, model, store)
    plan = Plan(
        run=secrets.token_hex(6),
        config=config,
        model=model,
        participants=(),
        start=start,
        **chosen,
    )
    _refuse_senseless(plan)
    participants = _participants(config, model, ledger)
    if not participants:
        raise BadConfig("clients: nobody takes part; weft clients list shows who is registered")
    budgets = ledger.budgets()
    private = [_with_privacy(p, plan, ledger, budgets.get(p.population)) for p in participants]
    plan = replace(plan, participants=tuple(sorted(private, key=lambda p: p.name)))
    _refuse_impossible_rounds(plan)
    return plan


def _anchored(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths: a run may be resumed from another folder."""
    if config.evaluate is None:
        return config
    place = {"data": data.absolute(config.evaluate.data)}
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=place)})


def _start(config: RunConfig, model: ModelSpec, store: AdapterStore) -> Start:
    if config.start_from is None:
        return Start()
    version = store.version(config.start_from)
    recipe = version.recipe
    theirs = recipe["model"]
    if theirs["hash"] != model.hash:
        raise BadConfig(
            f"start_from: {config.start_from} was trained on base model {theirs['hash'][:12]} "
            f"({theirs['id'] or 'a local folder'}), this run has {model.hash[:12]} ({model.id}); "
            "an adapter fits no other base"
        )
    if tuple(theirs["labels"]) != model.labels:
        raise BadConfig(
            f"labels: {config.start_from} has the label set {theirs['labels']}, this run "
            f"{list(model.labels)}; declare the same set and choose this run's with task_labels"
        )
    if config.start == "continue" and recipe["adapter"] != _as_json(config):
        raise BadConfig(
            f"adapter: {config.start_from} is {recipe['adapter']}; start: continue goes on with "
            "the same adapter; start: stack puts a new one on top"
        )
    if config.start == "fresh":  # its memory goes on; its adapter and head do not
        return Start("fresh", version.id)
    stack = tuple(recipe["stack"])
    if config.start == "stack":
        stack = (*stack, version.id)
    return Start(config.start, version.id, stack, tuple(recipe["seen_labels"]))


def _as_json(config: RunConfig) -> dict[str, object]:
    choice = config.adapter.checked("adapter")
    return {"name": choice.name, "options": dict(choice.options)}


def _adapter(plan: Plan) -> Adapter:
    adapter: Adapter = ADAPTERS.get(plan.adapter.name).build(**plan.adapter.options)
    return adapter


def _refuse_senseless(plan: Plan) -> None:
    """Refuse combinations in which a method would do nothing, or undo another.

    Raises:
        BadConfig: with the reason.
    """
    config = plan.config
    adapter = _adapter(plan)
    for needed, wanted, why in (
        ("dp-hooks", config.privacy is not None, "has no exact per-example gradients under DP"),
        ("low-rank", bool(plan.start.stack), "cannot be stacked on another adapter"),
    ):
        if wanted and needed not in adapter.capabilities:
            raise BadConfig(f"adapter {plan.adapter.name!r} {why}; use lora or rslora")
    names = models.shapes(plan.model, adapter)
    strategy = STRATEGIES.get(plan.strategy.name).build(**plan.strategy.options)
    # options that do not go together are found by building, before any client is asked
    OPTIMIZERS.get(plan.optimizer.name).build([torch.zeros(1)], **plan.optimizer.options)
    sample = {name: torch.ones(shape) for name, shape in names.items()}
    pattern = strategy.broadcast(strategy.init(sample), ClientSpec("anyone")).trainable
    trained = [n for n in names if re.fullmatch(pattern, n) and not n.endswith(".scaling")]
    if not trained:
        raise BadConfig(
            f"strategy {plan.strategy.name!r} trains {pattern!r}, and adapter "
            f"{plan.adapter.name!r} has no such tensor"
        )
    if config.stale is not None and not getattr(strategy, "additive", False):
        raise BadConfig(
            f"strategy {plan.strategy.name!r} changes from round to round what an update is "
            "relative to, so that one of an older version cannot be used; use ffa-lora or fedavg, "
            "or leave late: keep and asynchronous out"
        )
    for choice in plan.regularizers:
        method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
        moved = [n for n in trained if method.freezes and re.fullmatch(method.freezes, n)]
        if moved:
            raise BadConfig(
                f"regularizer {choice.name!r} (as set) needs {moved[0]} frozen, and strategy "
                f"{plan.strategy.name!r} trains it; use ffa-lora or fedsvd"
            )
        if not any(re.fullmatch(method.acts_on, n) for n in trained):
            raise BadConfig(
                f"regularizer {choice.name!r} (as set) acts on tensors that strategy "
                f"{plan.strategy.name!r} keeps frozen, so it would do nothing; use its hard form "
                "or a strategy that trains them"
            )
        reads = type(method).consolidate_from_data is not Regularizer.consolidate_from_data
        if reads and config.privacy is not None:
            raise BadConfig(
                f"regularizer {choice.name!r} computes its memory from data, which is not "
                "private; leave it out or run without privacy"
            )


def _refuse_impossible_rounds(plan: Plan) -> None:
    """Refuse rounds that could never get what they need.

    Raises:
        BadConfig: with the reason.
    """
    config = plan.config
    known = roster(plan.participants, config.cohort)
    names, needed = known.names, quorum(config, len(known.names))
    if not names:
        wanted = ", ".join(f"{k}={v}" for k, v in config.cohort.where.items())
        raise BadConfig(f"cohort.where: no client that takes part has the labels {wanted}")
    if config.asynchronous is not None and config.asynchronous.buffer > len(names):
        raise BadConfig(
            f"asynchronous.buffer: {config.asynchronous.buffer} updates are more than the "
            f"{len(names)} clients that may be asked can send from one version"
        )
    if needed > len(names):
        raise BadConfig(f"quorum: {needed} is more than the {len(names)} clients that may be asked")
    unknown = [name for name, w in zip(names, known.weights.tolist(), strict=True) if not w]
    if unknown:
        raise BadConfig(
            f"cohort.weight: examples needs every client's declared number of examples, and "
            f"{unknown[0]} has none; register it with --examples N"
        )


def _participants(config: RunConfig, model: ModelSpec, ledger: Ledger) -> list[Participant]:
    clients = config.clients
    if clients.simulate is not None:
        return _simulated(clients.simulate, config, model)
    if clients.names is not None:
        records = [ledger.client(name) for name in clients.names]
    else:
        records = ledger.clients(clients.select or {})
    return [_registered(record) for record in records]


def _registered(record: ClientRecord) -> Participant:
    return Participant(
        name=record.name,
        data=DataSpec(record.data, dict(record.fields)),
        population=record.population,
        num_examples=record.num_examples or 0,
        labels=dict(record.labels),
        public=record.public,
    )


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
    source = Path(data.parse_uri(simulate.data).path).name  # recipes hold no paths
    # otherwise nobody needs a size before the round, and each part is a pass over the data
    sized = config.privacy is not None or config.cohort.weight == "examples"
    found: list[Participant] = []
    taken: set[str] = set()
    for name, spec in parts:
        slug = _slug(name, taken)
        taken.add(slug)
        size = len(data.examples(spec, model)) if sized else 0
        found.append(Participant(slug, spec, f"{source}#{name}", size, {}, public))
    return found


def _slug(value: str, taken: Collection[str]) -> str:
    """Return a client's name made from a column's value, of which no other is made."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", value.lower())[:64].strip("-._") or "part"
    made, number = slug, 1
    while made in taken:
        number += 1
        made = f"{slug}-{number}"
    return made


def _with_privacy(
    who: Participant, plan: Plan, ledger: Ledger, budget: tuple[float, float] | None
) -> Participant:
    """Return the participant with its noise calibrated, or as it is in a run without DP.

    Raises:
        BadConfig: if its population has a budget and the run has no privacy.
        BudgetSpent: if no noise keeps within the budget.
    """
    config = plan.config
    if config.privacy is None:
        if budget is not None:
            raise BadConfig(
                f"{who.name}: its population {who.population!r} has a privacy budget "
                f"(ε = {budget[0]:g}), and this run has no privacy; add a privacy section or "
                "leave the client out"
            )
        return who
    if config.privacy.insecure_seed is not None and budget is not None:
        raise BadConfig(
            f"{who.name}: privacy.insecure_seed gives no privacy, and population "
            f"{who.population!r} has a budget (ε = {budget[0]:g}); leave insecure_seed out"
        )
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
    return replace(who, privacy=_calibrated(who, plan, ledger, budget))


def _calibrated(
    who: Participant, plan: Plan, ledger: Ledger, budget: tuple[float, float] | None
) -> Privacy:
    config = plan.config
    assert config.privacy is not None
    try:
        return calibrated(
            config.privacy,
            sample_rate=min(1.0, config.batch_size / who.num_examples),
            steps=(config.local_steps or 1) * min(plan.max_participations, config.rounds),
            history=[spend_from_row(r) for r in ledger.spends(who.population)] if budget else (),
            budget=budget,
        )
    except BudgetSpent as error:
        limit = f"ε = {budget[0]:g} (δ = {budget[1]:g})" if budget else "the run's ε"
        raise BudgetSpent(
            f"{who.name}: its population {who.population!r} cannot keep within {limit}: {error}. "
            "Raise its budget, plan fewer rounds or steps, or leave it out"
        ) from None
