"""Readings: rounds in which clients train nothing and say what a method asks of their data.

They take place before round 1 and of a run's result, where a regularizer needs one
(:mod:`clients.regularizers`), and go the way of every round: whom they ask and what they are made
of are events, what comes is checked and spilled, and a version has it among its updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clients.assignment import Assignment, PluginChoice
from clients.regularizers import REGULARIZERS, Regularizer, When, namespaced, recall, takes_part
from clients.seeds import seed_for
from clients.wire import unpack
from orchestrator.acceptance import Accepted
from orchestrator.cohort import Roster
from orchestrator.committed import Committed, consolidated, initialised
from orchestrator.history import History
from orchestrator.plan import Participant, Plan, RoundInputs, plan_round
from orchestrator.policy import share
from orchestrator.quarantine import quarantined
from strategies.base import Broadcast, ClientSpec, Tensors, Update


@dataclass(frozen=True, slots=True)
class Spilled:
    """Accepted updates as they were sent, read anew from disk by each who goes through them."""

    accepted: Sequence[Accepted]

    def __iter__(self) -> Any:
        """Read one after the other, in client order."""
        return (unpack(one.path.read_bytes()) for one in self.accepted)


def needed(regularizers: Iterable[PluginChoice], when: When) -> bool:
    """Return whether a run has a reading."""
    return any(takes_part(_built(choice), when) for choice in regularizers)


def opening(
    plan: Plan, known: Roster, history: History, unreachable: Collection[str], base: Committed
) -> dict[str, Any]:
    """Return the facts of the event that opens a reading of ``base``, but for which it is.

    Everybody is asked who may be, whether or not they trained: the memory is of the task, and not
    of those whom the last round drew.
    """
    barred = {*quarantined(plan.config, history), *unreachable}
    cohort = [name for name in known.names if name not in barred]
    least = plan.config.quorum
    fewest = share(least, len(cohort)) if isinstance(least, float) else min(least or 1, len(cohort))
    facts = {"round": base.round + 1, "base": base.version, "cohort": cohort}
    return {**facts, "goal": len(cohort), "quorum": fewest}


def plan_reading(
    plan: Plan,
    inputs: RoundInputs,
    broadcast: Callable[[ClientSpec], Broadcast],
    cohort: Sequence[Participant],
    when: When,
) -> list[Assignment]:
    """Return the assignments of a reading's clients, in their order; see :func:`plan_round`."""
    return [
        replace(
            asked,
            action=when,
            held=None,
            seed=seed_for(plan.config.seed, inputs.round, asked.client, when),
        )
        for asked in plan_round(plan, inputs, broadcast, cohort)
    ]


def prepared(
    regularizers: Sequence[PluginChoice],
    start: str,
    adapter: Tensors,
    memory: Tensors,
    updates: Iterable[Update],
) -> tuple[Tensors, Tensors]:
    """Return adapter and memory with which round 1 starts, after a reading.

    Args:
        regularizers: the run's.
        start: how the run starts; an adapter that is continued begins as it is.
        adapter: of the run's start.
        memory: of the run's start.
        updates: of the reading, in client order; gone through once a regularizer.
    """
    after = _combined("prepare", regularizers, adapter, memory, updates)
    if start != "continue":
        adapter = initialised(regularizers, adapter, after)
    return adapter, after


def settled(
    regularizers: Sequence[PluginChoice],
    adapter: Tensors,
    memory: Tensors,
    updates: Iterable[Update],
) -> Tensors:
    """Return the memory after the task, from the final adapter and its reading.

    Args:
        regularizers: the run's.
        adapter: the result's.
        memory: before.
        updates: of the reading, in client order; none where the run needs no reading.
    """
    after = consolidated(regularizers, adapter, memory)
    return _combined("consolidate", regularizers, adapter, after, updates)


def _combined(
    when: When,
    regularizers: Sequence[PluginChoice],
    adapter: Tensors,
    memory: Tensors,
    updates: Iterable[Update],
) -> Tensors:
    result = dict(memory)
    for choice in regularizers:
        method, name = _built(choice), choice.name
        if takes_part(method, when):
            own = recall(result, name)
            parts = (replace(u, tensors=recall(u.memory, name), memory={}) for u in updates)
            result = {k: v for k, v in result.items() if k.removeprefix(f"{name}/") not in own}
            result |= namespaced(method.combine(when, adapter, own, parts), name)
    return result


def _built(choice: PluginChoice) -> Regularizer:
    method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
    return method
