"""What makes no sense together is refused before anything starts, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from clients import data, models
from clients.adapters import Adapter
from clients.alignment import refuse_blind
from clients.assignment import ModelSpec
from clients.optimizers import OPTIMIZERS
from clients.per_example import engines_of
from clients.records import listed
from clients.regularizers import REGULARIZERS, Regularizer
from orchestrator.cohort import goal, quorum, roster
from orchestrator.config import BadConfig, RunConfig
from orchestrator.continual_refusals import refuse_continual
from orchestrator.memory_refusals import refuse_memory
from orchestrator.merging import stacked
from orchestrator.plan import Plan
from orchestrator.strategy_refusals import (
    adapter_of,
    refuse_budgets,
    refuse_ranks,
    refuse_strategy,
    refuse_uplink,
    strategy_of,
    trained_names,
)
from storage.refs import did_you_mean
from strategies.base import (
    Needs,
    Tensors,
    beneath,
    needs_of,
)
from strategies.tensors import same_products

Shapes: TypeAlias = Callable[[ModelSpec, Adapter], Mapping[str, tuple[int, ...]]]


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
    adapter = adapter_of(plan)
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
    strategy = strategy_of(plan)
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
        clients.weights.UnsupportedBase: if the base model's tokenizer cannot serve the task.
    """
    config = plan.config
    if config.task == "token-classification":
        refuse_blind(models.tokenizer(plan.model))
    adapter = adapter_of(plan)
    for wanted, has, why in (
        (
            config.dp_sgd is not None,
            bool(engines_of(adapter.capabilities)),
            "declares no engine that gives its exact per-example gradients, as privacy needs",
        ),
        (
            bool(plan.start.stack),
            "low-rank" in adapter.capabilities,
            "cannot be stacked on another adapter",
        ),
    ):
        if wanted and not has:
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
    refuse_strategy(plan, adapter)
    refuse_uplink(plan)
    adapter_shapes = shapes(plan.model, adapter)
    trained = trained_names(plan, adapter_shapes)
    refuse_continual(plan, adapter_shapes, trained)
    refuse_ranks(plan, adapter)
    if "zero-b" not in adapter.capabilities and plan.start.mode != "continue":
        _refuse_moved_start(plan, adapter_shapes)
    _refuse_regularizers(plan, trained, adapter_shapes)


def _refuse_regularizers(
    plan: Plan, trained: Sequence[str], adapter_shapes: Mapping[str, tuple[int, ...]]
) -> None:
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
        blocks = [n for n in adapter_shapes if n.endswith(".blocks")]
        if method.whole_factors and blocks:
            raise BadConfig(
                f"regularizer {choice.name!r} needs every layer's B and A whole, and adapter "
                f"{plan.adapter.name!r} keeps {blocks[0]}; use lora, or leave the regularizer out"
            )
        if method.freezes and not any(re.fullmatch(method.freezes, n) for n in adapter_shapes):
            raise BadConfig(
                f"regularizer {choice.name!r} (as set) chooses tensors that adapter "
                f"{plan.adapter.name!r} does not have, so it would do nothing; use lora, or leave "
                "the regularizer out"
            )
        refuse_memory(plan, choice.name, method, adapter_shapes, trained)


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
    _refuse_few_shares(config, needed)
    strategy = strategy_of(plan)
    _refuse_needy(plan, needs_of(strategy), names, needed)
    refuse_budgets(plan)
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


def _refuse_few_shares(config: RunConfig, needed: int) -> None:
    """Refuse rounds that could close without the whole noise, of which each client knows a part.

    Raises:
        BadConfig: with the reason.
    """
    shares = config.client_level.noise_shares if config.client_level else None
    if shares is not None and shares >= needed:
        raise BadConfig(
            f"privacy.noise_shares: {shares} clients make the whole noise, and a round makes do "
            f"with {needed} updates (quorum), of whose senders each can take its own share away "
            f"from the sum; it must be below the quorum: set quorum to {shares + 1} or more, or "
            "lower noise_shares"
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
