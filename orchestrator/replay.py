"""Replay: a version aggregated again from its stored updates, to the same id or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from clients.assignment import PluginChoice
from clients.seeds import seed_for
from clients.uplink import decoded
from clients.wire import unpack
from orchestrator.acceptance import moved
from orchestrator.committed import consolidated
from orchestrator.plan import head_labels, head_masked
from orchestrator.reading import prepared, settled
from orchestrator.recipes import drift
from orchestrator.weighing import declared
from orchestrator.workspace import Workspace
from storage.lineage import Version
from storage.updates import UpdateGone
from strategies import STRATEGIES
from strategies.base import ClientSpec, ServerState, Strategy, Tensors, Update

_AGGREGATED = ("round", "final", "prepared")


class NotReplayable(ValueError):
    """What is asked for was not made of client updates."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a version when it was made again.

    Attributes:
        version: its id.
        round: of its run.
        outcome: ``same``, ``differs``, or ``gone`` where an update is not kept any more.
        why: what differs, or is gone; "" where it is the same.
    """

    version: str
    round: int
    outcome: Literal["same", "differs", "gone"]
    why: str = ""


class _Gone(Exception):
    """An update is not kept any more."""


def replay(workspace: Workspace, ref: str, whole: bool = False) -> list[Replayed]:
    """Aggregate a version again from its stored updates, and compare ids.

    Args:
        workspace: where.
        ref: a round's version, or a run's result.
        whole: whether to go on with every version behind it that was made of updates.

    Returns:
        What became of each, newest first; of ``ref`` alone unless ``whole``.

    Raises:
        UnknownVersion: if there is no such version.
        NotReplayable: if it is not made of updates, and nothing else was asked for.
    """
    root = workspace.store.version(ref)
    if not whole and root.recipe["kind"] not in _AGGREGATED:
        raise NotReplayable(
            f"{root.id[:12]} is of kind {root.recipe['kind']!r}, which is not made of client "
            "updates; name a round's version, or replay all behind it with --all"
        )
    found = workspace.store.lineage(root.id).nodes.values() if whole else [root]
    return [_replayed(workspace, v) for v in found if v.recipe["kind"] in _AGGREGATED]


def _replayed(workspace: Workspace, version: Version) -> Replayed:
    recipe = version.recipe
    try:
        updates = list(_updates(workspace, recipe["updates"]))
    except _Gone as gone:
        return Replayed(version.id, recipe["round"], "gone", str(gone))
    if version.id in reached(workspace, version, updates):
        return Replayed(version.id, recipe["round"], "same")
    other = drift(recipe)
    why = f"it was made with {'; '.join(other)}" if other else "the same updates give other bytes"
    return Replayed(version.id, recipe["round"], "differs", why)


def reached(workspace: Workspace, version: Version, updates: Sequence[Update]) -> set[str]:
    """Return the ids that aggregating ``updates``, for all they say, can lead to.

    Of a round there are two, because only a run's end puts its task into the memory.

    Args:
        workspace: where the version's parent is.
        version: of kind ``round``, ``final`` or ``prepared``; its recipe says how.
        updates: in its recipe's order.
    """
    store, recipe = workspace.store, version.recipe
    [parent] = [one.id for one in version.parents]
    before = ServerState(store.tensors(parent), store.auxiliary(parent))
    after = before
    if recipe["kind"] == "round":
        strategy: Strategy = STRATEGIES.get(recipe["strategy"]["name"]).build(
            **recipe["strategy"]["options"]
        )
        after = strategy.aggregate(
            before, _onto(workspace, parent, before, recipe, strategy, updates)
        )
    memory: Tensors = store.memory(parent)
    choices = [PluginChoice(one["name"], one["options"]) for one in recipe["regularizers"]]
    memories = [memory, consolidated(choices, after.adapter, memory)]
    if recipe["kind"] == "final":
        memories = [settled(choices, after.adapter, memory, updates)]
    elif recipe["kind"] == "prepared":
        adapter, memory = prepared(choices, recipe["start"], after.adapter, memory, updates)
        after, memories = replace(after, adapter=adapter), [memory]
    return {
        store.identify(
            after.adapter,
            auxiliary=after.auxiliary,
            memory=kept,
            parents=version.parents,
            recipe=recipe,
        )
        for kept in memories
    }


def _onto(
    workspace: Workspace,
    parent: str,
    before: ServerState,
    recipe: Mapping[str, Any],
    strategy: Strategy,
    updates: Sequence[Update],
) -> Iterator[Update]:
    """Yield the updates, those of older versions as ones of the version that is aggregated."""
    store, states = workspace.store, {parent: before}
    for leaf, sent in zip(recipe["updates"], updates, strict=True):
        if sent.base not in states:
            states[sent.base] = ServerState(store.tensors(sent.base), store.auxiliary(sent.base))
        base = states[sent.base]
        update = declared(_decoded(recipe, leaf, sent, strategy, base), leaf)
        if update.base == parent:
            yield update
        else:
            yield moved(update, base.adapter, before.adapter, leaf["weight"])


def _decoded(
    recipe: Mapping[str, Any],
    leaf: Mapping[str, Any],
    update: Update,
    strategy: Strategy,
    base: ServerState,
) -> Update:
    """Return an update of ``base`` with the tensors that its client meant by what it sent."""
    uplink = [PluginChoice(one["name"], one["options"]) for one in recipe.get("uplink", ())]
    sent = strategy.broadcast(base, ClientSpec(update.client, leaf.get("rank")))
    trained = head_labels(recipe["regularizers"], recipe["task_labels"], recipe["seen_labels"])
    sent = head_masked(sent, recipe["model"]["labels"], trained)
    seed = seed_for(recipe["seed"], update.round, update.client)
    return replace(update, tensors=decoded(update.tensors, sent, uplink, seed))


def _updates(workspace: Workspace, leaves: Sequence[Mapping[str, Any]]) -> Iterator[Update]:
    for leaf in leaves:
        client, sha256 = leaf["client"], leaf["digest"]
        asked_in = asked_round(workspace, leaf)
        try:
            yield unpack(workspace.store.updates.read(sha256))
        except UpdateGone as gone:
            raise _Gone(
                f"the update {sha256[:12]} of {client} in round {asked_in} {gone.args[0]}"
            ) from gone


def asked_round(workspace: Workspace, leaf: Mapping[str, Any]) -> int:
    """Return the round in which an update was asked for: the one after that of its base."""
    round_: int = workspace.store.version(leaf["base"]).recipe["round"]
    return round_ + 1
