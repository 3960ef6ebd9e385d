"""A run's versions as what goes on from them: state and memory, and how memory begins and ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from clients.assignment import PluginChoice
from clients.regularizers import REGULARIZERS, Beginning, namespaced, recall
from orchestrator.merging import beneath, stacked
from orchestrator.plan import Plan
from storage.store import AdapterStore
from strategies.base import ServerState, Tensors
from strategies.base import beneath as kept_beneath


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed round.

    Attributes:
        round: 0 before the first round.
        version: its id.
        state: what the strategy carries.
        memory: regulariser memory.
        offset: id of what lies underneath besides the stack, or None.
    """

    round: int
    version: str
    state: ServerState
    memory: Tensors
    offset: str | None = None


@dataclass(slots=True)
class Commits:
    """A run's versions: from memory while somebody trains from them, else from the store.

    Attributes:
        store: where they are.
        stack: versions frozen underneath all of them, oldest first.
    """

    store: AdapterStore
    stack: tuple[str, ...] = ()
    _known: dict[str, Committed] = field(default_factory=dict, init=False)
    _common: dict[str | None, Tensors] = field(default_factory=dict, init=False)  # by offset
    _below: dict[str, Tensors] = field(default_factory=dict, init=False)

    def of(self, version: str) -> Committed:
        """Return one of the run's versions."""
        if version not in self._known:
            store, recipe = self.store, self.store.version(version).recipe
            state = ServerState(store.tensors(version), store.auxiliary(version))
            memory, offset = store.memory(version), recipe.get("offset")
            found = Committed(recipe["round"], version, state, memory, offset)
            self._known[version] = found
        return self._known[version]

    def below(self, version: str) -> Tensors:
        """Return all that lies frozen under a version's adapter; one object for all who ask."""
        done = self.of(version)
        if done.offset not in self._common:
            self._common[done.offset] = beneath(self.store, self.stack, done.offset)
        common, lying = self._common[done.offset], kept_beneath(done.state.auxiliary)
        if not lying:
            return common
        if version not in self._below:
            self._below[version] = stacked([*([common] if common else []), lying])
        return self._below[version]

    def add(self, done: Committed, awaited: Collection[str]) -> Committed:
        """Keep the newest version and those that updates are awaited from, and return the newest.

        Args:
            done: the newest.
            awaited: versions that somebody trains from.
        """
        self._known = {v: known for v, known in self._known.items() if v in awaited}
        self._known[done.version] = done
        self._below = {v: below for v, below in self._below.items() if v in self._known}
        return done


def initialised(regularizers: Sequence[PluginChoice], adapter: Tensors, memory: Tensors) -> Tensors:
    """Return a new adapter as the run's regularizers want it to begin."""
    for choice in regularizers:
        method = REGULARIZERS.get(choice.name).build(**choice.options)
        adapter = dict(method.initialise(adapter, recall(memory, choice.name)))
    return adapter


def begun(plan: Plan, adapter: Tensors, memory: Tensors) -> Tensors:
    """Return the memory that every round of a run has, once its first tensors are known."""
    labels, start = plan.model.labels, plan.start
    known = tuple(i for i, label in enumerate(labels) if label in start.seen_labels)
    beginning = Beginning(adapter, first=start.mode == "fresh", known=known)
    for choice in plan.regularizers:
        method = REGULARIZERS.get(choice.name).build(**choice.options)
        own = method.begin(beginning, recall(memory, choice.name))
        memory = _with(memory, choice.name, own)
    return memory


def consolidated(
    regularizers: Sequence[PluginChoice], adapter: Tensors, memory: Tensors
) -> Tensors:
    """Return the memory after the task, from the final adapter alone."""
    for choice in regularizers:
        method = REGULARIZERS.get(choice.name).build(**choice.options)
        own = method.consolidate(adapter, recall(memory, choice.name))
        memory = _with(memory, choice.name, own)
    return memory


def _with(memory: Tensors, name: str, own: Tensors) -> Tensors:
    """Return a memory in which the plug-in ``name`` has ``own`` and nothing else."""
    others = {key: tensor for key, tensor in memory.items() if not key.startswith(f"{name}/")}
    return {**others, **namespaced(own, name)}
