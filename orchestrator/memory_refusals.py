"""What a run would remember wrongly, or tell of people, is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from clients.optimizers import OPTIMIZERS
from clients.regularizers import Regularizer, reads_data, takes_part
from orchestrator.config import BadConfig
from orchestrator.plan import Plan
from orchestrator.strategy_refusals import agreed, strategy_of
from strategies.base import ClientSpec, Strategy


def refuse_memory(
    plan: Plan,
    name: str,
    method: Regularizer,
    shapes: Mapping[str, tuple[int, ...]],
    trained: Collection[str],
) -> None:
    """Refuse a memory that would not be private, or not of what the run trains.

    Args:
        plan: of a run.
        name: the regularizer's.
        method: the regularizer, as it is set.
        shapes: those of the adapter's tensors.
        trained: the names of those that are trained.

    Raises:
        BadConfig: with the reason.
    """
    _refuse_told(plan, name, method)
    what, capabilities = f"regularizer {name!r}", strategy_of(plan).capabilities
    keeps = type(method).consolidate is not Regularizer.consolidate
    if (keeps or takes_part(method, "consolidate")) and "beneath" in capabilities:
        raise BadConfig(
            f"{what} remembers a task by its final adapter, and strategy "
            f"{plan.strategy.name!r} lays a part of it beneath; use fedsvd, ffa-lora or "
            "flexlora, or leave the regularizer out"
        )
    if method.anchored:
        _refuse_adrift(plan, what, shapes, trained)
    _refuse_mixed(plan, what, method)
    if takes_part(method, "prepare"):
        _refuse_chosen_start(plan, name, method, shapes)


def _refuse_mixed(plan: Plan, what: str, method: Regularizer) -> None:
    """Refuse to hold a task's directions apart where the run mixes them again."""
    chosen = plan.optimizer
    optimizer = OPTIMIZERS.get(chosen.name).build([torch.zeros(1)], **chosen.options)
    if method.linear_steps and not isinstance(optimizer, torch.optim.SGD):
        raise BadConfig(
            f"{what} holds gradients within some directions, and the steps of optimizer "
            f"{chosen.name!r} leave them, because it rescales entries; use sgd"
        )
    reads = reads_data(method, "prepare") or reads_data(method, "consolidate")
    keeps = type(method).consolidate is not Regularizer.consolidate
    renewed = bool(method.freezes) or "directions" in strategy_of(plan).capabilities
    apart = reads or (keeps and not renewed)  # what is frozen, or drawn anew, is no earlier one's
    if apart and method.starts == "stack" and plan.start.mode == "continue":
        raise BadConfig(
            f"{what} keeps a new adapter away from what earlier tasks use, and with start: "
            "continue it is theirs that is trained on; use start: stack"
        )
    if method.freezes and plan.library and "recycles" in strategy_of(plan).capabilities:
        raise BadConfig(
            f"{what} (as set) chooses what stays frozen, and strategy {plan.strategy.name!r} takes "
            "it from the library; leave the regularizer out"
        )


def _refuse_told(plan: Plan, name: str, method: Regularizer) -> None:
    """Refuse to send what privacy does not cover."""
    reads = reads_data(method, "prepare") or reads_data(method, "consolidate")
    if reads and plan.config.privacy is not None:
        raise BadConfig(
            f"regularizer {name!r} computes its memory from data, which is not "
            "private; leave it out or run without privacy"
        )
    if takes_part(method, "consolidate") and plan.config.client_level is not None:
        raise BadConfig(
            f"regularizer {name!r} computes its memory from each client's own steps, and "
            "client-level privacy hides a client in the mean of updates alone; leave it out, or "
            "use privacy.level: example"
        )


def _refuse_adrift(
    plan: Plan, what: str, shapes: Mapping[str, tuple[int, ...]], trained: Collection[str]
) -> None:
    """Refuse to hold entries near values that they cannot be compared with."""
    if not _keeps_entries(strategy_of(plan), shapes, trained):
        raise BadConfig(
            f"{what} holds each entry near its value after an earlier task, and strategy "
            f"{plan.strategy.name!r} changes from run to run or round to round what an "
            "entry means, or which are trained; use ffa-lora or fedavg"
        )
    if plan.start.version is not None and plan.start.mode != "continue":
        raise BadConfig(
            f"{what} holds each entry near its value after an earlier task, and start: "
            f"{plan.start.mode} trains a new adapter; use start: continue, or leave it out"
        )
    if plan.config.ranks:
        raise BadConfig(
            f"ranks: {what} holds each entry near its value, and an adapter of a lower rank has "
            "not all of them; leave ranks or the regularizer out"
        )


def _keeps_entries(
    strategy: Strategy, shapes: Mapping[str, tuple[int, ...]], trained: Collection[str]
) -> bool:
    """Return whether an entry means the same in every round.

    A robust rule chooses and weighs updates, and what becomes of these is its inner strategy's.
    Not where a run begins with other entries than those it is given. Else where a change does, by
    the strategy's own word, or where clients that agree on trained tensors get these and no others
    of the same product.
    """
    if hasattr(strategy, "inner"):
        return _keeps_entries(strategy.inner, shapes, trained)
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.rand(shape, generator=generator) for n, shape in sorted(shapes.items())}
    state, anyone = strategy.init(drawn), ClientSpec("anyone")
    if state.adapter.keys() != drawn.keys() or "selects" in strategy.capabilities:
        return False
    if any(not torch.equal(state.adapter[n], t) for n, t in drawn.items()):
        return False
    if "additive" in strategy.capabilities:
        return True
    sent = strategy.broadcast(state, anyone)
    told = {
        n: t + torch.rand(t.shape, generator=generator) * sent.mask.get(n, torch.ones(()))
        for n, t in sorted(sent.tensors.items())
        if n in trained and re.fullmatch(sent.trainable, n)
    }
    after = agreed(strategy, state, told, least=2)
    same = all(torch.allclose(after.adapter[n], t, atol=1e-4) for n, t in told.items())
    return same and strategy.broadcast(after, anyone).trainable == sent.trainable


def _refuse_chosen_start(
    plan: Plan, name: str, method: Regularizer, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse to choose an adapter's start from data where the strategy chooses it itself."""
    if type(method).initialise is Regularizer.initialise:
        return
    drawn = {n: torch.ones(shape) for n, shape in shapes.items()}
    state = strategy_of(plan).init(drawn)
    same = all(torch.equal(state.adapter[n], drawn[n]) for n in drawn)
    if state.auxiliary or not same:
        raise BadConfig(
            f"regularizer {name!r} chooses from data what the adapter starts with, and strategy "
            f"{plan.strategy.name!r} chooses it too; use ffa-lora or fedavg"
        )
