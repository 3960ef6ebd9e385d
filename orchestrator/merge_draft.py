"""A merge before it is a version: what would be committed, and how it would be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from clients.assignment import PluginChoice
from orchestrator.config import BadConfig, find_plugin
from orchestrator.merging import (
    check_alike,
    common_stack,
    merged_heads,
    split_head,
    stacked,
    task_vector,
)
from orchestrator.recipes import merge_recipe
from orchestrator.signing import admitted
from orchestrator.workspace import Workspace
from storage.lineage import Parent, Version
from storage.store import AdapterStore
from strategies.base import Tensors
from strategies.terms import Measured


@dataclass(frozen=True, slots=True)
class Draft:
    """A merge that is not committed.

    Attributes:
        parts: the merged versions, in the order given.
        weights: one for each.
        vectors: what each part itself changes, without a head.
        tensors: of the merge.
        recipe: of the merge.
        metrics: what the merge measured of itself.
    """

    parts: tuple[Version, ...]
    weights: tuple[float, ...]
    vectors: tuple[Tensors, ...]
    tensors: Mapping[str, Tensor]
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]

    @property
    def version(self) -> Version:
        """The version that it would be, without an id."""
        return Version(
            id="",
            tensors="",
            auxiliary=None,
            memory=None,
            parents=tuple(sorted(Parent(version.id, "merge") for version in self.parts)),
            recipe=dict(self.recipe),
            metrics=dict(self.metrics),
            created_at=datetime.now(UTC),
            names=(),
            aliases=(),
        )

    def effective(self, store: AdapterStore) -> dict[str, Tensor]:
        """Return what it does when it is used: what lies underneath and itself as one, and head."""
        below = [task_vector(store, store.version(ref)) for ref in self.recipe["stack"]]
        own, head = split_head(self.tensors)
        return {**stacked([*below, own]), **head}

    def commit(self, workspace: Workspace) -> str:
        """Commit the merge and return its id."""
        return workspace.store.commit(
            self.tensors,
            parents={version.id: "merge" for version in self.parts},
            recipe=self.recipe,
            metrics=self.metrics,
        )


def draft(
    workspace: Workspace,
    refs: Sequence[str],
    method: PluginChoice,
    weights: Sequence[float] | None = None,
) -> Draft:
    """Return the merge of versions; nothing is written.

    Args:
        workspace: where.
        refs: at least two versions of one base model.
        method: the merge and its options.
        weights: one per version; by default 1 for each, so that task adapters add up.

    Raises:
        BadMerge: if they do not belong together.
        Unsigned: if the signature policy does not let one be loaded.
        UnknownPlugin, BadOptions: if the merge is unknown or wrongly set.
    """
    store = workspace.store
    if len(refs) < 2:
        raise BadConfig("a merge needs at least two versions")
    chosen = list(weights or [1.0] * len(refs))
    if len(chosen) != len(refs):
        raise BadConfig(f"give one weight per version: {len(refs)} versions, {len(chosen)} weights")
    plugin = find_plugin("merge", method.name)
    options = plugin.check(method.options)
    versions = [admitted(workspace, ref) for ref in refs]
    check_alike(versions, refs)
    stack = common_stack(versions)
    vectors = [task_vector(store, v) for v in versions]
    adapter = plugin.build(vectors, chosen, **options)
    head = merged_heads([split_head(store.tensors(v.id))[1] for v in versions], versions, chosen)
    return Draft(
        parts=tuple(versions),
        weights=tuple(chosen),
        vectors=tuple(vectors),
        tensors={**adapter, **head},
        recipe=merge_recipe(
            {v.id: v.recipe for v in versions},
            {v.id: w for v, w in zip(versions, chosen, strict=True)},
            PluginChoice(plugin.name, options),
            stack,
        ),
        metrics=adapter.metrics if isinstance(adapter, Measured) else {},
    )
