"""What a version changes, which versions may be merged, and what the merge of their heads is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.adapters import ADAPTERS, Adapter
from orchestrator.growing import is_beginning
from storage.lineage import Version
from storage.store import AdapterStore
from strategies.base import Tensors
from strategies.base import beneath as kept_beneath
from strategies.merges.cat import cat

MERGEABLE = frozenset({"low-rank", "low-rank-and-shifts"})
"""What an adapter is, so that its changes are a vector that can be merged as it is."""


class BadMerge(ValueError):
    """These versions cannot be merged."""


class NotAModel(ValueError):
    """This version is no model by itself that weft can use."""


def split_head(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (adapter tensors, head tensors)."""
    head = {k: v for k, v in tensors.items() if k.startswith("head.")}
    return {k: v for k, v in tensors.items() if k not in head}, head


def stacked(layers: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return the sum of stacked adapters as one factored adapter; heads are left out.

    Exact: the factors are concatenated. Empty for no layer.
    """
    adapters = [split_head(layer)[0] for layer in layers]
    if len(adapters) < 2:
        return adapters[0] if adapters else {}
    return cat(adapters, [1.0] * len(adapters))


def task_vector(store: AdapterStore, version: Version) -> dict[str, Tensor]:
    """Return what a version itself changes, as one adapter without a head.

    That is its adapter, its offset, and what its strategy keeps beneath. A low-rank adapter's as
    plain factors; any other adapter's are its tensors as they are.
    """
    own = split_head(store.tensors(version.id))[0]
    adapter = adapter_of(version)
    if "low-rank" not in adapter.capabilities:
        return own
    offset = version.recipe.get("offset")  # recipes before offsets have no such key
    lying = kept_beneath(store.auxiliary(version.id))
    below = [*([store.tensors(offset)] if offset else []), *([lying] if lying else [])]
    return stacked([*below, adapter.factored(own)])


def beneath(store: AdapterStore, stack: Sequence[str], offset: str | None) -> dict[str, Tensor]:
    """Return all that lies frozen under a run's adapter from its start, as one factored adapter."""
    layers = [task_vector(store, store.version(ref)) for ref in stack]
    return stacked([*layers, *([store.tensors(offset)] if offset else [])])


def effective(store: AdapterStore, version: Version) -> dict[str, Tensor]:
    """Return what a version does when it is used: its stack and itself as one, and its head."""
    below = [task_vector(store, store.version(ref)) for ref in version.recipe["stack"]]
    head = split_head(store.tensors(version.id))[1]
    return {**stacked([*below, task_vector(store, version)]), **head}


def adapter_of(version: Version) -> Adapter:
    """Return the adapter method that a version was trained with.

    Raises:
        NotAModel: if the version is the offset of others, or stays in PEFT's own format.
    """
    refuse_offset(version)
    refuse_kept(version)
    choice = version.recipe["adapter"]
    adapter: Adapter = ADAPTERS.get(choice["name"]).build(**choice["options"])
    return adapter


def refuse_offset(version: Version) -> None:
    """Refuse what is only part of other versions.

    Raises:
        NotAModel: if it is.
    """
    what = {
        "offset": "the offset that other versions took out of the base model",
        "basis": "the basis that other versions are written in",
    }.get(version.recipe["kind"])
    if what is not None:
        raise NotAModel(f"{version.id[:12]} is {what}, and no adapter by itself; name one of those")


def refuse_kept(version: Version) -> None:
    """Refuse an imported adapter that weft keeps as PEFT wrote it.

    Raises:
        NotAModel: if it is one.
    """
    if version.recipe.get("peft") is not None:
        raise NotAModel(
            f"{version.id[:12]} is a {version.recipe['adapter']['name']} adapter that weft keeps "
            "in PEFT's own format; it can be named, promoted, signed and exported, and only LoRA, "
            "rsLoRA, DoRA, aLoRA and BD-LoRA on linear layers can also be trained on, merged and "
            "scored"
        )


def refuse_personal(version: Version) -> None:
    """Refuse a version of which a part of the adapter stayed at the clients.

    Raises:
        NotAModel: if it is one.
    """
    if version.recipe.get("personal"):
        name = version.recipe["strategy"]["name"]
        raise NotAModel(
            f"{version.id[:12]} was trained with {name}, by which a part of the adapter stays at "
            "each client; it is no model without one: it can be gone on with by start: continue"
        )


def common_stack(versions: Sequence[Version]) -> tuple[str, ...]:
    """Return the versions that stay underneath the merge of ``versions``.

    Those that were trained on top of others in the merge are whole within it. What lies under all
    of them stays underneath.

    Raises:
        BadMerge: if one was trained on a version that is neither.
    """
    merged = {v.id for v in versions}
    left = [tuple(ref for ref in v.recipe["stack"] if ref not in merged) for v in versions]
    for version, stack in zip(versions, left, strict=True):
        for ref in stack:
            if not all(ref in other for other in left):
                raise BadMerge(
                    f"{version.id[:12]} was trained on top of {ref[:12]}, which is not in the "
                    "merge; add it"
                )
    return left[0]


def check_alike(versions: Sequence[Version], refs: Sequence[str], convert: bool = False) -> None:
    """Refuse versions that do not belong together.

    Args:
        versions: at least one.
        refs: what they were called, for messages.
        convert: whether what is no plain product is to be converted, and so not refused.

    Raises:
        BadMerge: naming the first two that differ, and in what.
        NotAModel: if one is only part of others, or of what its clients have.
    """
    if len({v.id for v in versions}) < len(versions):
        raise BadMerge("a version is given twice; weights say how much each counts")
    for version in versions:
        refuse_offset(version)
        refuse_personal(version)
    first, longest = versions[0].recipe, widest(versions)
    for ref, version in zip(refs, versions, strict=True):
        recipe = version.recipe
        for what, ours, theirs in (
            ("base model hash", first["model"]["hash"], recipe["model"]["hash"]),
            ("task kind", first["model"]["kind"], recipe["model"]["kind"]),
            ("pooling", first["model"]["pooling"], recipe["model"]["pooling"]),
        ):
            if ours != theirs:
                raise BadMerge(
                    f"{refs[0]} and {ref} have different {what}s: {_short(ours)} and "
                    f"{_short(theirs)}; only adapters of one base model and task merge"
                )
        labels, most = recipe["model"]["labels"], longest.recipe["model"]["labels"]
        if not is_beginning(labels, most):
            raise BadMerge(
                f"{refs[versions.index(longest)]} and {ref} have different label sets: "
                f"{_short(most)} and {_short(labels)}; the longest must begin with the others"
            )
        if not convert and not MERGEABLE & adapter_of(version).capabilities:
            name = recipe["adapter"]["name"]
            raise BadMerge(
                f"{ref} is a {name} adapter, which is not a plain product B A; --convert merges "
                "the LoRA that is nearest to it, and says how near"
            )


def merged_heads(
    heads: Sequence[Tensors], versions: Sequence[Version], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return one head that takes each label's row from the versions that learned it.

    A row learned by several is their weighted mean, without those that another of them was stacked
    on: it went on from their row; and without those that are taken away by a negative weight, if
    any is added. One learned by none is that of the version with most labels.
    """
    if not heads or not heads[0]:
        return {}
    last = widest(versions)
    labels = last.recipe["model"]["labels"]
    rows = {}
    for name, first in heads[versions.index(last)].items():
        merged = first.clone()
        for index, label in enumerate(labels):
            owners = _owners(label, versions)
            owners = [i for i in owners if weights[i] > 0] or owners
            total = sum(abs(weights[i]) for i in owners)
            if total > 0:
                parts = [heads[i][name][index].double() * abs(weights[i]) for i in owners]
                merged[index] = (torch.stack(parts).sum(dim=0) / total).to(first.dtype)
        rows[name] = merged
    return rows


def widest(versions: Sequence[Version]) -> Version:
    """Return the version with most labels, the first of several: with all that any other has."""
    return max(versions, key=lambda version: len(version.recipe["model"]["labels"]))


def _owners(label: str, versions: Sequence[Version]) -> list[int]:
    """Return the indices of the versions whose row of ``label`` counts."""
    learned = [i for i, v in enumerate(versions) if label in v.recipe["task_labels"]]
    underneath = {ref for i in learned for ref in versions[i].recipe["stack"]}
    return [i for i in learned if versions[i].id not in underneath]


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
