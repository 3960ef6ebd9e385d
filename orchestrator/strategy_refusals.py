"""What does not go with a run's strategy is refused, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from clients import models
from clients.adapters import ADAPTERS, Adapter
from clients.optimizers import OPTIMIZERS
from clients.optimizers.descent import PlainDescent
from clients.uplink import stages
from orchestrator.config import BadConfig
from orchestrator.plan import Plan
from orchestrator.ranks import adapter_at
from orchestrator.weighing import weighing_label
from strategies import STRATEGIES
from strategies.base import (
    Broadcast,
    ClientSpec,
    ServerState,
    Strategy,
    Tensors,
    Update,
    corrections,
    needs_of,
)
from strategies.plugins import BadOptions
from strategies.tensors import NotLowRank
from strategies.uplink import refuse_chain


def adapter_of(plan: Plan) -> Adapter:
    """Return the adapter method of a plan, with its options."""
    adapter: Adapter = ADAPTERS.get(plan.adapter.name).build(**plan.adapter.options)
    return adapter


def strategy_of(plan: Plan) -> Strategy:
    """Return the strategy of a plan, with its options."""
    strategy: Strategy = STRATEGIES.get(plan.strategy.name).build(**plan.strategy.options)
    return strategy


def agreed(strategy: Strategy, state: ServerState, tensors: Tensors, least: int = 1) -> ServerState:
    """Return what a round makes of clients that all send ``tensors``: as many as it needs.

    Args:
        strategy: whose round.
        state: before it.
        tensors: what each has trained.
        least: how many clients at least.
    """
    needs = needs_of(strategy)
    update = Update(needs.client or "anyone", 1, "", tensors, 1, declared=1.0)
    others = [replace(update, client=f"{i}") for i in range(1, max(needs.updates, least))]
    return strategy.aggregate(state, [update, *others])


def refuse_strategy(plan: Plan, adapter: Adapter) -> None:
    """Refuse a strategy by what it says is true of it.

    Raises:
        BadConfig: with the reason.
    """
    config, name = plan.config, plan.strategy.name
    strategy = strategy_of(plan)
    _refuse_central(plan, strategy)
    if config.dp_sgd is not None and "private" not in strategy.capabilities:
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


def _refuse_central(plan: Plan, strategy: Strategy) -> None:
    """Refuse client-level privacy where a round is more than the mean of its clients.

    Raises:
        BadConfig: with the reason.
    """
    if plan.config.client_level is None:
        return
    if "mean-only" not in strategy.capabilities:
        raise BadConfig(
            f"strategy {plan.strategy.name!r} (as set) makes more of the updates than their mean, "
            "and client-level privacy hides each client in the mean alone; use ffa-lora, fedsvd or "
            "fedavg, or privacy.level: example"
        )
    if weighing_label(plan.strategy.options):
        raise BadConfig(
            "strategy.weighting: under client-level privacy clients count alike, so that one can "
            "change no more than another; leave the label out, or use privacy.level: example"
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


def refuse_budgets(plan: Plan) -> None:
    """Refuse budgets of ranks that are none, once it is known who takes part.

    Raises:
        BadConfig: naming the first client whose label is no budget.
    """
    strategy = strategy_of(plan)
    if "selects" not in strategy.capabilities:
        return
    shapes = models.shapes(plan.model, adapter_of(plan))
    state = strategy.init({n: torch.ones(shape) for n, shape in shapes.items()})
    for who in plan.participants:
        try:
            strategy.broadcast(state, ClientSpec(who.name, who.rank, who.labels))
        except ValueError as error:
            raise BadConfig(f"strategy {plan.strategy.name!r}: {error}") from error


def refuse_ranks(plan: Plan, adapter: Adapter) -> None:
    """Refuse ranks that the strategy, the adapter or the rounds know nothing to do with.

    Raises:
        BadConfig: with the reason.
    """
    config, name = plan.config, plan.strategy.name
    if not config.ranks:
        return
    strategy = strategy_of(plan)
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


def refuse_uplink(plan: Plan) -> None:
    """Refuse encodings that undo each other, or keep what means nothing a round later.

    Raises:
        BadConfig: with the reason.
    """
    chain = stages(plan.uplink)
    try:
        refuse_chain([(c.name, one) for c, one in zip(plan.uplink, chain, strict=True)])
    except ValueError as error:
        raise BadConfig(f"uplink: {error}") from None
    strategy = strategy_of(plan)
    if chain and "selects" in strategy.capabilities:
        raise BadConfig(
            f"uplink: with strategy {plan.strategy.name!r} clients send the ranks that they choose,"
            " and an encoding takes tensors whose shapes are known before; leave uplink out, or "
            "use rolora (of hetlora: leave prune out)"
        )
    for choice, stage in zip(plan.uplink, chain, strict=True):
        if stage.feedback and "additive" not in strategy.capabilities:
            raise BadConfig(
                f"uplink: with {choice.name!r} (as set) clients send later what they left out, and "
                f"strategy {plan.strategy.name!r} changes from round to round what a change is "
                "relative to; set feedback: false, or use ffa-lora or fedavg"
            )


def trained_names(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the tensors that the run trains, of those with ``shapes``.

    Raises:
        BadConfig: if none of the adapter's is among them, or the strategy undoes the adapter.
    """
    strategy = strategy_of(plan)
    adapter = adapter_of(plan)
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
        first = {n: 2 * state.adapter[n] for n in trained if re.fullmatch(sent[0].trainable, n)}
        after = agreed(strategy, state, first).adapter
        kept = [n for n in sample if re.fullmatch(adapter.frozen, n)]
        moved = [n for n in kept if not torch.equal(after[n], sample[n])]
        if moved:
            raise BadConfig(
                f"strategy {plan.strategy.name!r} changes {moved[0]}, which adapter "
                f"{plan.adapter.name!r} keeps as it is; use fedavg"
            )
    return trained
