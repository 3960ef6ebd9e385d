"""The version that round 1 starts from, and the offset that it lies on, if any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from clients.assignment import Assignment
from clients.initialisations import OFFSET
from clients.regularizers import recall
from clients.seeds import seed_for
from orchestrator.cohort import asked_a_round, roster
from orchestrator.committed import Committed, begun, initialised
from orchestrator.growing import grown, grown_memory
from orchestrator.library import adapters
from orchestrator.merging import beneath as lying_beneath
from orchestrator.merging import split_head, stacked
from orchestrator.plan import Plan, RoundInputs, plan_init
from orchestrator.recipes import offset_recipe, start_recipe
from storage.store import AdapterStore
from strategies.base import BENEATH, ServerState, Setting, Strategy, Tensors, Update, beneath


def begin(
    plan: Plan,
    store: AdapterStore,
    strategy: Strategy,
    make: Callable[[Tensors], Update],
    commit: Callable[..., str],
) -> Committed:
    """Commit the version that round 1 starts from, after the offset that it lies on.

    Args:
        plan: the run's plan.
        store: where the versions are that the run starts from.
        strategy: the run's strategy.
        make: returns the adapter's first tensors, made where the base model is, from the memory.
        commit: :meth:`AdapterStore.commit`, or what only says the id and takes the same.
    """
    start = plan.start
    memory: Tensors = store.memory(start.version) if start.version else {}
    adapter: Tensors = store.tensors(start.version) if start.version else {}
    old, labels = start.labels or plan.model.labels, plan.model.labels
    memory = grown_memory(memory, old, labels)
    adapter = grown(adapter, old, labels, plan.config.seed)
    offset, read = start.offset, None
    if start.mode != "continue":
        kept = split_head(adapter)[1] if start.mode == "stack" else {}  # rows of earlier tasks
        made, offset, read = _split(plan, commit, make(memory))
        adapter = initialised(plan.regularizers, {**made, **kept}, memory)
    state = strategy.init(adapter, setting_of(plan, store))
    if start.mode == "continue" and start.version:
        state = _over(state, beneath(store.auxiliary(start.version)))
    memory = begun(plan, state.adapter, memory)
    edge = "init" if start.mode == "fresh" else start.mode
    parents = dict.fromkeys(plan.library, "recycle")
    parents |= {start.version: edge} if start.version else {}
    version = commit(
        state.adapter,
        auxiliary=state.auxiliary,
        memory=memory,
        parents=parents | ({offset: "offset"} if offset else {}),
        recipe=start_recipe(plan, offset, read),
        metrics=state.metrics,
    )
    return Committed(0, version, state, memory, offset)


def rehearse(
    plan: Plan,
    store: AdapterStore,
    strategy: Strategy,
    make: Callable[[Assignment], Update],
    site: str,
) -> Committed:
    """Return the version that round 1 starts from, with nothing committed.

    Args:
        plan: the run's plan.
        store: where the versions are that the run starts from.
        strategy: the run's strategy.
        make: does the assignment that makes the adapter's first tensors.
        site: folder of the clients' private state meanwhile.
    """

    def first(memory: Tensors) -> Update:
        below = lying_beneath(store, plan.start.stack, None)
        return make(plan_init(plan, RoundInputs(0, "", below, memory, site)))

    def identified(tensors: Tensors, *, metrics: object = None, **rest: Any) -> str:
        return store.identify(tensors, **rest)  # metrics are in no id

    return begin(plan, store, strategy, first, identified)


def _over(state: ServerState, lying: Tensors) -> ServerState:
    """Return a state that lies on ``lying`` too, whichever strategy put it there."""
    own = beneath(state.auxiliary)
    below = stacked([part for part in (lying, own) if part])
    auxiliary = {**state.auxiliary, **{BENEATH + name: t for name, t in below.items()}}
    return replace(state, auxiliary=auxiliary)


def _split(
    plan: Plan, commit: Callable[..., str], made: Update
) -> tuple[Tensors, str | None, Mapping[str, Any] | None]:
    """Return the adapter's own tensors, its offset's id, and which data they come from."""
    offset = recall(made.tensors, OFFSET.removesuffix("/"))
    own = {k: v for k, v in made.tensors.items() if not k.startswith(OFFSET)}
    read = {"examples": made.num_examples, "fingerprint": made.fingerprint}
    chosen = read if made.fingerprint else None
    if not offset:
        return own, None, chosen
    return own, commit(offset, parents={}, recipe=offset_recipe(plan, chosen)), chosen


def setting_of(plan: Plan, store: AdapterStore) -> Setting:
    """Return what a strategy may know of the run before round 1; ``store`` has its library."""
    return Setting(
        num_clients=len(roster(plan.participants, plan.config.cohort).names),
        cohort=asked_a_round(plan),
        seed=seed_for(plan.config.seed, 0, "strategy"),
        library=adapters(plan, store),
    )
