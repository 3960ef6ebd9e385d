"""What makes no sense together is refused before anything starts, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from clients import data, models
from clients.adapters import ADAPTERS, Adapter
from clients.assignment import ModelSpec
from clients.optimizers import OPTIMIZERS
from clients.optimizers.descent import PlainDescent
from clients.records import listed
from clients.regularizers import REGULARIZERS, Regularizer
from clients.uplink import stages
from orchestrator.cohort import goal, quorum, roster
from orchestrator.config import BadConfig, RunConfig
from orchestrator.merging import stacked
from orchestrator.plan import Plan
from orchestrator.ranks import adapter_at
from storage.refs import did_you_mean
from strategies import STRATEGIES
from strategies.base import (
    Broadcast,
    ClientSpec,
    Needs,
    Strategy,
    Tensors,
    Update,
    beneath,
    corrections,
    needs_of,
)
from strategies.plugins import BadOptions
from strategies.tensors import NotLowRank, same_products
from strategies.uplink import refuse_chain

Shapes: TypeAlias = Callable[[ModelSpec, Adapter], Mapping[str, tuple[int, ...]]]


def _adapter(plan: Plan) -> Adapter:
    adapter: Adapter = ADAPTERS.get(plan.adapter.name).build(**plan.adapter.options)
    return adapter


def _strategy(plan: Plan) -> Strategy:
    strategy: Strategy = STRATEGIES.get(plan.strategy.name).build(**plan.strategy.options)
    return strategy


def _refuse_init(config: RunConfig, adapter: Adapter) -> None:
    """Refuse a start that cannot be computed, or not without showing data to everyone.

    Raises:
        BadConfig: with the reason.
    """
    name, quantization = config.adapter.name, config.model.quantization
    if "nf4-base" in adapter.capabilities and quantization != "nf4":
        raise BadConfig(
            f"adapter {name!r} (as set) starts from what quantisation to nf4 lost, and "
            f"model.quantization is {quantization!r}; set it to nf4, or choose another init"
        )
    chosen, reads = config.init_data, "reads-data" in adapter.capabilities
    if chosen is None:
        if reads and config.start != "continue":
            raise BadConfig(
                f"adapter {name!r} (as set) makes its first tensors from data; give init_data: "
                "{data: URI, public: true}, a data set that everyone may see"
            )
    elif not reads:
        raise BadConfig(
            f"init_data: adapter {name!r} (as set) reads no data; leave it out, or choose init "
            "eva, corda or lora_ga (of lora-sb: gradient)"
        )
    elif not (chosen.public or data.is_public(chosen.data)):
        raise BadConfig(
            f"init_data: {chosen.data} is not known to be public, and what is made of it goes to "
            "every client without noise; give data that everyone may see, and say so with "
            "init_data.public: true"
        )


def _refuse_moved_start(plan: Plan, names: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what would change the product that the adapter starts with before round 1.

    The offset underneath takes away exactly that product: another would not be the base model.

    Raises:
        BadConfig: naming what would change it.
    """
    adapter = _adapter(plan)
    generator = torch.Generator().manual_seed(0)
    drawn, past = (
        {n: torch.randn(shape, generator=generator) for n, shape in names.items()} for _ in range(2)
    )
    movers: list[tuple[str, Tensors]] = []
    for choice in plan.regularizers:
        method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
        movers.append(
            (f"regularizer {choice.name!r}", method.initialise(drawn, method.consolidate(past, {})))
        )
    strategy = _strategy(plan)
    state = strategy.init(drawn)
    lying = beneath(state.auxiliary)
    begun = stacked([*([lying] if lying else []), adapter.factored(state.adapter)])
    movers.append((f"strategy {plan.strategy.name!r}", begun))
    for what, after in movers:
        if not same_products(adapter.factored(drawn), adapter.factored(after)):
            raise BadConfig(
                f"{what} (as set) chooses A anew before round 1, and adapter "
                f"{plan.adapter.name!r} (as set) starts with a product B A that must stay as it "
                "is; choose init kaiming or gaussian, where B starts at zero"
            )


def refuse_senseless(plan: Plan, shapes: Shapes = models.shapes) -> None:
    """Refuse combinations in which a method would do nothing, or undo another.

    Args:
        plan: of a run.
        shapes: returns those of an adapter's tensors on a model.

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
    _refuse_init(config, adapter)
    if "unquantised-base" in adapter.capabilities and config.model.quantization != "none":
        raise BadConfig(
            f"adapter {plan.adapter.name!r} (as set) needs a base model that is not quantised, and "
            f"model.quantization is {config.model.quantization}; leave that out, or choose another "
            "adapter or init"
        )
    if "causal-only" in adapter.capabilities and config.task != "causal-lm":
        raise BadConfig(
            f"adapter {plan.adapter.name!r} is for models that generate, and the task is "
            f"{config.task}; use lora, or task: causal-lm"
        )
    # options that do not go together are found by building, before any client is asked
    OPTIMIZERS.get(plan.optimizer.name).build([torch.zeros(1)], **plan.optimizer.options)
    _refuse_strategy(plan, adapter)
    _refuse_uplink(plan)
    trained = trained_names(plan, shapes(plan.model, adapter))
    _refuse_ranks(plan, adapter)
    if "zero-b" not in adapter.capabilities and plan.start.mode != "continue":
        _refuse_moved_start(plan, shapes(plan.model, adapter))
    _refuse_regularizers(plan, trained)


def _refuse_strategy(plan: Plan, adapter: Adapter) -> None:
    config, name = plan.config, plan.strategy.name
    strategy = _strategy(plan)
    if config.privacy is not None and "private" not in strategy.capabilities:
        raise BadConfig(
            f"strategy {name!r} (as set) lets clients send what depends on their data besides "
            "trained tensors, which example-level privacy does not cover; use fedsvd or ffa-lora, "
            "or run without privacy"
        )
    if "beneath" in strategy.capabilities and "low-rank" not in adapter.capabilities:
        raise BadConfig(
            f"strategy {name!r} lays a part of what is learned beneath the adapter, and adapter "
            f"{plan.adapter.name!r} changes the base model by more than a product that adds to "
            "one beneath; use flexlora or fedavg, or adapter lora or rslora"
        )
    if "personal" in strategy.capabilities and config.evaluate is not None:
        raise BadConfig(
            f"evaluate: with strategy {name!r} a part of the adapter stays at each client, and no "
            "version is a whole model; leave evaluate out"
        )


def _refuse_correction(plan: Plan, sent: Broadcast) -> None:
    """Refuse control variates where clients could learn none from what their steps move.

    Raises:
        BadConfig: with the reason.
    """
    if not corrections(sent.extra):
        return
    name, chosen = plan.strategy.name, plan.optimizer
    optimizer = OPTIMIZERS.get(chosen.name).build([torch.zeros(1)], **chosen.options)
    if not isinstance(optimizer, PlainDescent):
        raise BadConfig(
            f"strategy {name!r} learns a client's gradient from how far its steps moved, and with "
            f"optimizer {chosen.name!r} (as set) that is no sum of gradients; use sgd without "
            "momentum and weight_decay"
        )
    if plan.config.local_steps is None:
        raise BadConfig(
            f"strategy {name!r} learns a client's gradient from how far its steps moved, and "
            "epochs are not as many steps for everybody; give steps"
        )
    if plan.uplink:
        raise BadConfig(
            f"uplink: strategy {name!r} and its clients both learn from how far steps moved, and "
            "with an encoding they would see different moves; leave uplink out"
        )


def _refuse_ranks(plan: Plan, adapter: Adapter) -> None:
    """Refuse ranks that the strategy, the adapter or the rounds know nothing to do with.

    Raises:
        BadConfig: with the reason.
    """
    config, name = plan.config, plan.strategy.name
    if not config.ranks:
        return
    strategy = _strategy(plan)
    if "any-rank" not in strategy.capabilities:
        raise BadConfig(
            f"ranks: strategy {name!r} takes factors of one rank only; use flexlora, flora or "
            "hetlora, or leave ranks out"
        )
    if config.stale is not None:
        raise BadConfig(
            "ranks: an update of a lower rank cannot be moved onto a newer version; leave late: "
            "keep and asynchronous out, or ranks"
        )
    most = plan.adapter.options.get("r")
    for rule in config.ranks:
        if most is None or rule.r > most:
            raise BadConfig(
                f"ranks: {rule.r} is above the adapter's r, {most}, which is the rank of the "
                "result; raise adapter.r, or lower the client's"
            )
    shapes = models.shapes(plan.model, adapter)
    state = strategy.init({n: torch.ones(shape) for n, shape in shapes.items()})
    for rank in sorted({rule.r for rule in config.ranks}):
        _refuse_rank(plan, rank, strategy.broadcast(state, ClientSpec("anyone", rank)).tensors)


def _refuse_rank(plan: Plan, rank: int, sent: Tensors) -> None:
    """Refuse a rank at which the adapter has other tensors than its clients would be sent."""
    choice = adapter_at(plan.adapter, rank)
    try:
        lower: Adapter = ADAPTERS.get(choice.name).build(**choice.options)
    except BadOptions as error:
        raise BadConfig(f"ranks: {error}") from None
    wanted = models.shapes(plan.model, lower)
    odd = sorted(n for n in wanted if n not in sent or wanted[n] != tuple(sent[n].shape))
    if odd:
        raise BadConfig(
            f"ranks: at rank {rank}, {odd[0]} of adapter {choice.name!r} is {list(wanted[odd[0]])},"
            f" and strategy {plan.strategy.name!r} sends it otherwise; use lora, rslora or dora"
        )


def _refuse_uplink(plan: Plan) -> None:
    """Refuse encodings that undo each other, or keep what means nothing a round later.

    Raises:
        BadConfig: with the reason.
    """
    chain = stages(plan.uplink)
    try:
        refuse_chain([(c.name, one) for c, one in zip(plan.uplink, chain, strict=True)])
    except ValueError as error:
        raise BadConfig(f"uplink: {error}") from None
    strategy = _strategy(plan)
    for choice, stage in zip(plan.uplink, chain, strict=True):
        if stage.feedback and "additive" not in strategy.capabilities:
            raise BadConfig(
                f"uplink: with {choice.name!r} (as set) clients send later what they left out, and "
                f"strategy {plan.strategy.name!r} changes from round to round what a change is "
                "relative to; set feedback: false, or use ffa-lora or fedavg"
            )


def _refuse_regularizers(plan: Plan, trained: Sequence[str]) -> None:
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
        strategy = _strategy(plan)
        keeps = type(method).consolidate is not Regularizer.consolidate
        if keeps and "beneath" in strategy.capabilities:
            raise BadConfig(
                f"regularizer {choice.name!r} remembers a task by its final adapter, and strategy "
                f"{plan.strategy.name!r} lays a part of it beneath; use fedsvd, ffa-lora or "
                "flexlora, or leave the regularizer out"
            )
        reads = type(method).consolidate_from_data is not Regularizer.consolidate_from_data
        if reads and plan.config.privacy is not None:
            raise BadConfig(
                f"regularizer {choice.name!r} computes its memory from data, which is not "
                "private; leave it out or run without privacy"
            )


def trained_names(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the tensors that the run trains, of those with ``shapes``.

    Raises:
        BadConfig: if none of the adapter's is among them, or the strategy undoes the adapter.
    """
    strategy = _strategy(plan)
    adapter = _adapter(plan)
    sample = {n: torch.ones(shape) for n, shape in shapes.items()}
    try:
        state = strategy.init(sample)
    except NotLowRank as error:
        if "core" in strategy.capabilities:
            raise BadConfig(
                f"strategy {plan.strategy.name!r} trains cores between frozen factors, and adapter "
                f"{plan.adapter.name!r} has none ({error})"
            ) from error
        raise BadConfig(
            f"strategy {plan.strategy.name!r} needs plain factors B and A, and adapter "
            f"{plan.adapter.name!r} has others ({error}); use fedavg"
        ) from error
    # two rounds: a strategy may train one factor after the other
    anyone, later = ClientSpec("anyone"), strategy.aggregate(state, [])
    sent = [strategy.broadcast(one, anyone) for one in (state, later)]
    _refuse_correction(plan, sent[0])
    pattern = "|".join(dict.fromkeys(one.trainable for one in sent))
    asked = [n for n in sample if re.fullmatch(pattern, n) and not n.endswith(".scaling")]
    trained = [n for n in asked if not re.fullmatch(adapter.frozen, n)]
    if all(n.startswith("head.") for n in trained):
        frozen = [n for n in asked if n not in trained]
        why = f"keeps {frozen[0]} frozen; use fedavg" if frozen else "has no such tensor"
        raise BadConfig(
            f"strategy {plan.strategy.name!r} trains {pattern!r}, and adapter "
            f"{plan.adapter.name!r} {why}"
        )
    if "trains-a" in adapter.capabilities and not any(".lora_A." in n for n in trained):
        raise BadConfig(
            f"strategy {plan.strategy.name!r} keeps A frozen, and adapter {plan.adapter.name!r} "
            "(as set) differs from lora in how A trains; use fedavg, or adapter lora"
        )
    if adapter.frozen:
        needs = needs_of(strategy)
        first = {n: 2 * sample[n] for n in trained if re.fullmatch(sent[0].trainable, n)}
        update = Update(needs.client or "anyone", 1, "", first, 1, declared=1.0)
        others = [replace(update, client=f"{i}") for i in range(1, needs.updates)]
        after = strategy.aggregate(state, [update, *others]).adapter
        kept = [n for n in sample if re.fullmatch(adapter.frozen, n)]
        moved = [n for n in kept if not torch.equal(after[n], sample[n])]
        if moved:
            raise BadConfig(
                f"strategy {plan.strategy.name!r} changes {moved[0]}, which adapter "
                f"{plan.adapter.name!r} keeps as it is; use fedavg"
            )
    return trained


def refuse_impossible_rounds(plan: Plan) -> None:
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
    strategy = _strategy(plan)
    _refuse_needy(plan, needs_of(strategy), names, needed)
    if config.stale is not None and "additive" not in strategy.capabilities:
        raise BadConfig(
            f"strategy {plan.strategy.name!r} changes from round to round what an update is "
            "relative to, so that one of an older version cannot be used; use ffa-lora or "
            "fedavg, or leave late: keep and asynchronous out"
        )
    unknown = [name for name, w in zip(names, known.weights.tolist(), strict=True) if not w]
    if unknown:
        raise BadConfig(
            f"cohort.weight: examples needs every client's declared number of examples, and "
            f"{unknown[0]} has none; register it with --examples N"
        )


def _refuse_needy(plan: Plan, needs: Needs, names: Sequence[str], least: int) -> None:
    """Refuse rounds that could close without what the strategy needs of each.

    Raises:
        BadConfig: with the reason.
    """
    what = f"strategy {plan.strategy.name!r} (as set)"
    if needs.updates > least:
        raise BadConfig(
            f"{what} needs {needs.updates} updates in every round, and a round makes do with "
            f"{least} (quorum) of the {len(names)} clients that may be asked; set quorum: "
            f"{needs.updates} or more, or withstand fewer hostile clients"
        )
    if not needs.client:
        return
    if needs.client not in names:
        hint = did_you_mean(needs.client, names) or f" (clients: {listed(names)})"
        raise BadConfig(f"{what} needs client {needs.client!r}, which takes no part{hint}")
    enough = goal(plan.config, len(names))
    if plan.config.asynchronous is not None or enough < len(names):
        raise BadConfig(
            f"{what} needs client {needs.client!r} in every round, and a round closes with "
            f"{enough} of {len(names)} clients; wait for all: leave cohort and asynchronous out"
        )
