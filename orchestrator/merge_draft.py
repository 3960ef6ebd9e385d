"""A merge before it is a version: what would be committed, and how it would be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from clients.assignment import PluginChoice
from clients.shifts import SHIFT
from orchestrator.config import BadConfig, find_plugin
from orchestrator.merge_parts import Allow, Parts, parts_of
from orchestrator.merging import merged_heads, split_head, stacked, task_vector
from orchestrator.recipes import merge_recipe
from orchestrator.workspace import Workspace
from storage.lineage import Parent, Version
from storage.store import AdapterStore
from strategies.base import Tensors
from strategies.terms import Measured
from strategies.whole import as_layers, from_layers


@dataclass(frozen=True, slots=True)
class Draft:
    """A merge that is not committed.

    Attributes:
        parts: the merged versions, in the order given.
        weights: one for each.
        vectors: what each part itself changes, without a head, as low-rank layers: changes of whole
            parameters as columns.
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

    @property
    def merged(self) -> dict[str, Tensor]:
        """What comes of ``vectors``, likewise without a head and as low-rank layers."""
        own = split_head(self.tensors)[0]
        return as_layers(own, [name for name in own if SHIFT in name])

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
    allow: Allow = Allow(),  # noqa: B008  (frozen)
) -> Draft:
    """Return the merge of versions; nothing is written.

    Args:
        workspace: where.
        refs: at least two versions of one base model.
        method: the merge and its options.
        weights: one per version; by default 1 for each, so that task adapters add up.
        allow: what else may be: different layers, what must be converted.

    Raises:
        BadConfig: if there are not two versions, or not a weight for each.
        BadMerge: if they do not belong together.
        Unsigned: if the signature policy does not let one be loaded.
        UnknownPlugin, BadOptions: if the merge is unknown or wrongly set.
    """
    plugin = find_plugin("merge", method.name)
    chosen = PluginChoice(plugin.name, plugin.check(method.options))
    given = list(weights or [1.0] * len(refs))
    if len(given) != len(refs):
        raise BadConfig(f"give one weight per version: {len(refs)} versions, {len(given)} weights")
    return draft_of(workspace, parts_of(workspace, refs, allow), chosen, given, allow.rank)


def draft_of(
    workspace: Workspace,
    parts: Parts,
    method: PluginChoice,
    weights: Sequence[float],
    rank: int | None = None,
) -> Draft:
    """Return the merge of what versions change.

    Args:
        workspace: where the versions are.
        parts: what they change.
        method: the merge and its options, all of them.
        weights: one per version.
        rank: what of :class:`orchestrator.merge_parts.Allow` what was converted was cut to.

    Raises:
        BadOptions: if the method cannot merge these.
    """
    versions, store = parts.versions, workspace.store
    merged = find_plugin("merge", method.name).build(parts.vectors, weights, **method.options)
    heads = [split_head(store.tensors(v.id))[1] for v in versions]
    recipe = merge_recipe(
        {v.id: v.recipe for v in versions},
        {v.id: w for v, w in zip(versions, weights, strict=True)},
        method,
        parts.stack,
        {v: {"from": one.method, "rank": rank} for v, one in parts.converted.items()},
    )
    kept = {f"converted_energy/{v[:12]}": one.energy for v, one in parts.converted.items()}
    return Draft(
        parts=versions,
        weights=tuple(weights),
        vectors=parts.vectors,
        tensors={
            **from_layers(merged, parts.shapes),
            **merged_heads(heads, versions, weights),
        },
        recipe={**recipe, "adapter": dict(parts.adapter)},
        metrics={**(merged.metrics if isinstance(merged, Measured) else {}), **kept},
    )
