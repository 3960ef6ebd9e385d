"""What a run's clients find of what they kept in the runs that it goes on from.

It is read from the lineage alone: what a client kept is named by the update that it sent then, and
a recipe has the digests of the updates that its version is made of. So a run that starts from an
old version, or forks, finds what was kept by then; a client that took no part in a task finds what
it kept in the last in which it did; of a merge it is what lies the fewest versions back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from clients.assignment import Past
from clients.regularizers import rehearses
from clients.seeds import seed_for
from orchestrator.budgets import Budgets, check_limits
from orchestrator.plan import Participant, Plan
from storage.lineage import Lineage
from storage.store import AdapterStore

_BEHIND = ("init", "round", "continue", "stack", "merge")
"""Kinds of parents whose tasks a version has learned: not those that only gave it a basis."""


def with_past(plan: Plan, store: AdapterStore, budgets: Budgets) -> Plan:
    """Return a plan whose clients know where they find what they kept; as it is without rehearsal.

    Raises:
        BadConfig: if people whose examples a client kept have a budget that this run does not keep.
    """
    if not any(rehearses(one.name, one.options) for one in plan.regularizers):
        return plan
    behind = plan.start.version
    leaves = _leaves(store.lineage(behind)) if behind else {}
    people = []
    for who in plan.participants:
        own = leaves.get(who.name, [])
        for population in sorted({leaf["population"] for leaf in own} - {who.population}):
            earlier: Participant = replace(who, population=population)
            check_limits(earlier, plan, budgets.on(population))
        update = own[0]["digest"] if own else ""
        seed = seed_for(plan.config.seed, "past", who.name, update)
        people.append(replace(who, past=Past(update, seed)))
    return replace(plan, participants=tuple(people))


def rehearsed_people(plan: Plan, store: AdapterStore) -> set[str]:
    """Return the populations, but for public ones, of whose examples a run's clients kept some."""
    behind = plan.start.version
    if behind is None or not any(rehearses(one.name, one.options) for one in plan.regularizers):
        return set()
    leaves = _leaves(store.lineage(behind))
    own = [leaf for who in plan.participants for leaf in leaves.get(who.name, [])]
    return {leaf["population"] for leaf in own if not leaf["public"]}


def levels(lineage: Lineage) -> Iterator[list[str]]:
    """Yield the versions whose tasks the last one has learned, itself first, the nearest first."""
    parents = defaultdict(set)
    for edge in lineage.edges:
        if edge.kind in _BEHIND:
            parents[edge.child].add(edge.parent)
    level, seen = [lineage.root], {lineage.root}
    while level:
        yield level
        level = sorted({p for version in level for p in parents[version]} - seen)
        seen |= set(level)


def _leaves(lineage: Lineage) -> dict[str, list[Mapping[str, Any]]]:
    """Return by client the leaves of rounds in which it kept examples, the nearest first."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for version in chain.from_iterable(levels(lineage)):
        for leaf in _kept_in(lineage.nodes[version].recipe):
            found[leaf["client"]].append(leaf)
    return found


def _kept_in(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the leaves of a round that trained; what only read data kept no examples."""
    if recipe["kind"] != "round":
        return []
    choices = recipe.get("regularizers", ())
    return list(recipe["updates"]) if any(rehearses(**choice) for choice in choices) else []
