"""In what two versions differ: tensors, scores, and the recipes that made them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.merging import adapter_of, effective, split_head
from orchestrator.workspace import Workspace
from storage.lineage import Version
from strategies.comparison import (
    LayerDifference,
    TensorDifference,
    compare_layers,
    compare_tensors,
)
from strategies.tensors import lora_layers

_MISSING = "-"


class BadDiff(ValueError):
    """Two versions that cannot be compared."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What the second version changed against the first.

    Attributes:
        first: id.
        second: id.
        layers: low-rank layers, with all that lies frozen under an adapter in training; empty
            where a version is of another method.
        tensors: the others, such as heads; all of them where a version is of another method.
        metrics: (first, second) by name; None where a version was not scored so.
        recipe: (first, second) by path, such as ``adapter.options.r``; ``-`` where there is none.
        clients: those whose updates only the first holds itself, and only the second.
    """

    first: str
    second: str
    layers: tuple[LayerDifference, ...]
    tensors: tuple[TensorDifference, ...]
    metrics: Mapping[str, tuple[float | None, float | None]]
    recipe: Mapping[str, tuple[Any, Any]]
    clients: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of all low-rank layers together, in the first and the second."""
        first, second = (
            zip(*(x.norms for x in self.layers), strict=True) if self.layers else ((), ())
        )
        return math.hypot(*first), math.hypot(*second)

    @property
    def change(self) -> float:
        """Frobenius norm of the change of all low-rank layers together."""
        return math.hypot(*(x.change for x in self.layers))


def diff(workspace: Workspace, first: str, second: str) -> Diff:
    """Return what the second version changed against the first.

    What is compared is what a version does when it is used: its stack and its offset count.

    Raises:
        UnknownVersion: if there is no such version.
        BadDiff: if they adapt different base models.
        NotAModel: if one is only part of others.
    """
    store = workspace.store
    one, other = store.version(first), store.version(second)
    hashes = [version.recipe["model"]["hash"] for version in (one, other)]
    if hashes[0] != hashes[1]:
        raise BadDiff(
            f"{first} and {second} adapt different base models: {hashes[0][:12]} and "
            f"{hashes[1][:12]}; compare versions of one"
        )
    layers: list[LayerDifference] = []
    before, after = effective(store, one), effective(store, other)
    if all("low-rank" in adapter_of(version).capabilities for version in (one, other)):
        (own, before), (others, after) = split_head(before), split_head(after)
        layers = compare_layers(lora_layers(own), lora_layers(others))
    return Diff(
        first=one.id,
        second=other.id,
        layers=tuple(layers),
        tensors=tuple(compare_tensors(before, after)),
        metrics={
            name: (one.metrics.get(name), other.metrics.get(name))
            for name in sorted(one.metrics.keys() | other.metrics.keys())
        },
        recipe=_changed(one.recipe, other.recipe),
        clients=_clients(one, other),
    )


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = dict(_flat(first)), dict(_flat(second))
    return {
        path: (before.get(path, _MISSING), after.get(path, _MISSING))
        for path in sorted(before.keys() | after.keys())
        if before.get(path, _MISSING) != after.get(path, _MISSING)
    }


def _flat(recipe: Mapping[str, Any], above: str = "") -> Sequence[tuple[str, Any]]:
    """Return a recipe's values by their paths, without its client updates."""
    found: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        if key == "updates" and not above:
            continue
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{above}{key}.")
        else:
            found.append((above + key, value))
    return found


def _clients(one: Version, other: Version) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first, second = ({leaf["client"] for leaf in v.recipe["updates"]} for v in (one, other))
    return tuple(sorted(first - second)), tuple(sorted(second - first))
