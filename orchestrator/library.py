"""The adapters of the store that a run's strategy starts from: its library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clients import models
from clients.adapters import ADAPTERS, Adapter
from clients.assignment import ModelSpec
from orchestrator.config import BadConfig
from orchestrator.merging import adapter_of, refuse_personal, task_vector
from orchestrator.plan import Plan
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import Setting, Strategy, Tensors
from strategies.library import BadLibrary
from strategies.tensors import NotLowRank


def resolved(refs: Sequence[str], model: ModelSpec, store: AdapterStore) -> tuple[str, ...]:
    """Return the ids of the versions that a config's ``library`` names, in its order.

    Raises:
        BadConfig: if one is of another base model, no plain product, or given twice.
        UnknownVersion: if there is none.
        orchestrator.merging.NotAModel: if one is no model by itself that weft can use.
    """
    found: dict[str, str] = {}
    for ref in refs:
        version = store.version(ref)
        adapter = adapter_of(version)
        refuse_personal(version)
        theirs = version.recipe["model"]
        if theirs["hash"] != model.hash:
            raise BadConfig(
                f"library: {ref} was trained on base model {theirs['hash'][:12]} "
                f"({theirs['id'] or 'a local folder'}), this run has {model.hash[:12]} "
                f"({model.id}); an adapter fits no other base, so leave it out"
            )
        if "low-rank" not in adapter.capabilities:
            raise BadConfig(
                f"library: {ref} is a {version.recipe['adapter']['name']} adapter, which is not a "
                "plain product B A; leave it out"
            )
        if version.id in found:
            raise BadConfig(f"library: {found[version.id]} and {ref} are one version; leave one")
        found[version.id] = ref
    return tuple(found)


def adapters(plan: Plan, store: AdapterStore) -> list[Tensors]:
    """Return what each version of a run's library changes, as plain factors without a head."""
    return [task_vector(store, store.version(ref)) for ref in plan.library]


def refuse_useless(plan: Plan, store: AdapterStore) -> None:
    """Refuse a library that the run could not start from, and a run that needs one and has none.

    Raises:
        BadConfig: with the reason.
    """
    name, goes_on = plan.strategy.name, plan.start.mode == "continue"
    strategy: Strategy = STRATEGIES.get(name).build(**plan.strategy.options)
    if not plan.library:
        if "needs-library" in strategy.capabilities and not goes_on:
            raise BadConfig(
                f"strategy {name!r} starts from adapters in the store, and the run names none; "
                "give library: [refs], such as what these clients trained before with lora"
            )
        return
    if "recycles" not in strategy.capabilities:
        raise BadConfig(
            f"library: strategy {name!r} makes nothing of adapters in the store; use eigenlorax or "
            "lori, or leave library out"
        )
    adapter: Adapter = ADAPTERS.get(plan.adapter.name).build(**plan.adapter.options)
    if not goes_on and (
        "zero-b" not in adapter.capabilities or "reads-data" in adapter.capabilities
    ):
        raise BadConfig(
            f"library: adapter {plan.adapter.name!r} (as set) starts from factors that its init "
            f"makes, and strategy {name!r} takes them from the library; leave init out, or library"
        )
    shapes = models.shapes(plan.model, adapter)
    begun: Tensors = {n: torch.zeros(shape) for n, shape in shapes.items()}
    if goes_on and plan.start.version:
        begun = store.tensors(plan.start.version)
    try:
        strategy.init(begun, Setting(library=adapters(plan, store)))
    except (BadLibrary, NotLowRank) as error:
        raise BadConfig(f"library: {error}") from error
