"""What a method of continual learning does not go with is refused, with the reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from clients.regularizers import REGULARIZERS, Regularizer
from orchestrator.config import BadConfig
from orchestrator.plan import Plan
from orchestrator.strategy_refusals import agreed, strategy_of
from strategies.base import ClientSpec

Shapes = Mapping[str, tuple[int, ...]]


def refuse_continual(plan: Plan, shapes: Shapes, trained: Collection[str]) -> None:
    """Refuse regularizers that could not do what they are for.

    Args:
        plan: of a run.
        shapes: of the adapter's tensors on the run's model.
        trained: names of those that the run trains.

    Raises:
        BadConfig: with the reason.
    """
    rehearsing = []
    for choice in plan.regularizers:
        method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
        if method.holds:
            _refuse_held(plan, choice.name, method)
            if method.holds == "tensors" and _turns(plan, shapes, trained):
                raise BadConfig(
                    f"regularizer {choice.name!r} holds every round against the start entry by "
                    f"entry, and strategy {plan.strategy.name!r} (as set) factors B A anew in "
                    "every round, after which an entry means something else; use ffa-lora or "
                    "fedavg, or lwf"
                )
        if method.rehearsal is not None:
            rehearsing.append(choice.name)
            _refuse_rehearsal(plan, choice.name, method.rehearsal.outputs)
    if len(rehearsing) > 1:
        raise BadConfig(
            f"regularizers {rehearsing[0]!r} and {rehearsing[1]!r} both keep examples, and a "
            "client has one reservoir; choose one of them"
        )


def _refuse_held(plan: Plan, name: str, method: Regularizer) -> None:
    """Refuse what does not keep a round comparable with the run's start.

    Raises:
        BadConfig: with the reason.
    """
    strategy, what = strategy_of(plan), f"regularizer {name!r} holds every round against the start"
    if "beneath" in strategy.capabilities:
        raise BadConfig(
            f"{what}, and strategy {plan.strategy.name!r} (as set) lays what is learned beneath "
            "the adapter, where that cannot be seen; use ffa-lora or fedavg, or leave the "
            "regularizer out"
        )
    if "personal" in strategy.capabilities or plan.config.head == "personal":
        raise BadConfig(
            f"{what}, and a part of the model stays at each client, which has no common start; use "
            "ffa-lora or fedavg and head: train, or leave the regularizer out"
        )
    if plan.config.ranks:
        raise BadConfig(
            f"{what}, which has the adapter's whole rank, and ranks gives clients lower ones; "
            "leave ranks or the regularizer out"
        )
    if method.holds == "outputs" and plan.start.mode == "fresh" and plan.start.version:
        raise BadConfig(
            f"{what}, and start: fresh begins with an adapter that has learned nothing; use start: "
            "continue or start: stack"
        )


def _turns(plan: Plan, shapes: Shapes, trained: Collection[str]) -> bool:
    """Return whether a round gives back something else than what its only client sent.

    A rule that wraps another may give less weight to what it is given, and turns nothing itself.
    """
    strategy = strategy_of(plan)
    while "additive" not in strategy.capabilities and hasattr(strategy, "inner"):
        strategy = strategy.inner
    if "additive" in strategy.capabilities:
        return False
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    scalings = {n: torch.ones(()) for n in shapes if n.endswith(".scaling")}
    state = strategy.init(drawn | scalings)
    sent = strategy.broadcast(state, ClientSpec("anyone"))
    moved = {
        n: t + torch.randn(t.shape, generator=generator)
        for n, t in sent.tensors.items()
        if n in trained and re.fullmatch(sent.trainable, n)
    }
    after = agreed(strategy, state, moved).adapter
    expected = {**state.adapter, **moved}
    return not all(torch.allclose(after[n], t, atol=1e-4) for n, t in expected.items())


def _refuse_rehearsal(plan: Plan, name: str, outputs: bool) -> None:
    """Refuse to train on kept examples where that would not be counted, or cannot be done.

    Raises:
        BadConfig: with the reason.
    """
    if plan.config.privacy is not None:
        raise BadConfig(
            f"regularizer {name!r} trains again on examples of earlier tasks, more often than the "
            "sample that the accountant counts and perhaps of other people; leave it out (lwf and "
            "l2-sp read none), or run without privacy"
        )
    if outputs and plan.model.kind == "causal-lm":
        raise BadConfig(
            f"regularizer {name!r} keeps the logits of each example, one a label, and the task is "
            "causal-lm, whose every token has one for each of its vocabulary; use replay, which "
            "keeps none"
        )
