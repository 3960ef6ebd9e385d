"""How a run's memory begins and ends: what is committed of its readings, and written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from clients.regularizers import When
from orchestrator.acceptance import Accepted
from orchestrator.committed import Committed
from orchestrator.history import History
from orchestrator.plan import Plan
from orchestrator.reading import Spilled, needed, prepared, settled
from orchestrator.recipes import final_recipe, prepared_recipe
from orchestrator.retention import keep_round
from orchestrator.spending import Log
from storage.store import AdapterStore

Read: TypeAlias = Callable[[Committed, When], list[Accepted]]
"""Asks clients what a version is to remember, and returns what was accepted of it, written down."""


@dataclass(frozen=True, slots=True)
class Remembering:
    """The versions that a run commits for its memory's sake, each once.

    Attributes:
        plan: the run's plan.
        store: where versions are committed.
        read: has clients read.
        log: writes an event.
        history: returns the run's history, with all events so far.
    """

    plan: Plan
    store: AdapterStore
    read: Read
    log: Log
    history: Callable[[], History]

    @property
    def ends_apart(self) -> bool:
        """Whether the memory of the task goes to a version of its own, after all rounds.

        So where it is known only then which version is the result, or where clients must see it.
        """
        chooses = self.plan.config.stop is not None or self.plan.config.select == "best"
        methods = self.plan.regularizers
        return bool(methods) and (chooses or needed(methods, "consolidate"))

    def prepared(self, done: Committed) -> Committed:
        """Return what the next round starts from: for a start that is to be read, what it made."""
        methods = self.plan.regularizers
        if done.round or not needed(methods, "prepare"):
            return done
        recipe = self.store.version(done.version).recipe
        if recipe["kind"] == "prepared":
            return done
        accepted = self.read(done, "prepare")
        adapter, memory = prepared(
            methods, recipe["start"], done.state.adapter, done.memory, Spilled(accepted)
        )
        state = replace(done.state, adapter=adapter)
        version = self.store.commit(
            adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents={done.version: "init"},
            recipe=prepared_recipe(recipe, [one.leaf for one in accepted]),
        )
        self._keep(version, 0, accepted)
        self.log("prepared", {"base": done.version, "version": version})
        return Committed(0, version, state, memory, done.offset)

    def settled(self, result: Committed) -> str:
        """Return the id of a run's result with the memory of its task."""
        methods, known = self.plan.regularizers, self.history().consolidated
        if not self.ends_apart:
            return result.version
        if result.version in known:
            return known[result.version]
        reads = needed(methods, "consolidate")
        accepted = self.read(result, "consolidate") if reads else []
        recipe = self.store.version(result.version).recipe
        version = self.store.commit(
            result.state.adapter,
            auxiliary=result.state.auxiliary,
            memory=settled(methods, result.state.adapter, result.memory, Spilled(accepted)),
            parents={result.version: "round"},
            recipe=final_recipe(recipe, [one.leaf for one in accepted]),
        )
        self._keep(version, result.round + 1, accepted)
        self.log("consolidated", {"base": result.version, "version": version})
        return version

    def _keep(self, version: str, round_: int, accepted: Sequence[Accepted]) -> None:
        if accepted and self.plan.config.retention.keep != "none":
            keep_round(self.store, self.plan.run, version, round_, accepted)
