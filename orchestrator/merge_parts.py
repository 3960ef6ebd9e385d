"""What versions change, as low-rank layers that any merge takes; or why they cannot be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.adapters import ADAPTERS
from clients.conversion import Conversion, NotConvertible, convert, convert_kept
from clients.shifts import SHIFT
from orchestrator.bases import base_of
from orchestrator.config import BadConfig
from orchestrator.merging import (
    MERGEABLE,
    BadMerge,
    adapter_of,
    check_alike,
    common_stack,
    split_head,
    task_vector,
    widest,
)
from orchestrator.signing import admitted
from orchestrator.versions import as_it_is
from orchestrator.workspace import Workspace
from storage.lineage import Version
from strategies.base import Tensors
from strategies.tensors import lora_layers
from strategies.whole import as_layers


@dataclass(frozen=True, slots=True)
class Allow:
    """What is refused in a merge if it is not asked for.

    Attributes:
        union: that versions adapt different layers; a layer that one has not counts as zero there.
        convert: that a version that is no plain product is merged as the nearest LoRA.
        rank: the most that a converted layer gets, >= 1; None is the smallest rank that keeps 99 %
            of it, 64 at most.
        model: where the base model lies now, for converting, if not where it was last seen.
    """

    union: bool = False
    convert: bool = False
    rank: int | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """Versions that may be merged, and what each changes, as low-rank layers.

    Attributes:
        versions: in the order they were given.
        vectors: of each.
        stack: versions that stay underneath.
        shapes: of whole parameters that are among the layers, as columns.
        converted: by id, of those that were converted.
        adapter: the method that holds a merge of them, and its options.
    """

    versions: tuple[Version, ...]
    vectors: tuple[Tensors, ...]
    stack: tuple[str, ...]
    shapes: Mapping[str, Sequence[int]]
    converted: Mapping[str, Conversion]
    adapter: Mapping[str, Any]


def parts_of(workspace: Workspace, refs: Sequence[str], allow: Allow) -> Parts:
    """Return versions as what each changes, if they may be merged.

    Raises:
        BadConfig: if there are not two.
        BadMerge: if they do not belong together, or none of them holds what a merge would be.
        Unsigned: if the signature policy does not let one be loaded.
    """
    if len(refs) < 2:
        raise BadConfig("a merge needs at least two versions")
    versions = [admitted(workspace, ref) for ref in refs]
    check_alike(versions, refs, allow.convert)
    stack = common_stack(versions)
    vectors: list[Tensors] = []
    converted: dict[str, Conversion] = {}
    shapes: dict[str, Sequence[int]] = {}
    for ref, version in zip(refs, versions, strict=True):
        vector: Tensors
        if _is_vector(version):
            vector = task_vector(workspace.store, version)
            whole = sorted(name for name in vector if SHIFT in name)
            shapes |= {name: vector[name].shape for name in whole}
            vector = as_layers(vector, whole)
        else:
            converted[version.id] = _converted(workspace, ref, version, allow)
            vector = converted[version.id].tensors
        vectors.append(vector)
    if not allow.union:
        _check_layers(refs, vectors)
    adapter = _adapter(versions, shapes, converted)
    return Parts(tuple(versions), tuple(vectors), stack, shapes, converted, adapter)


def _is_vector(version: Version) -> bool:
    return version.recipe.get("peft") is None and bool(MERGEABLE & adapter_of(version).capabilities)


def _converted(workspace: Workspace, ref: str, version: Version, allow: Allow) -> Conversion:
    """Return a version's adapter as the nearest LoRA.

    Raises:
        BadMerge: if there is none, with the reason.
    """
    spec, own = base_of(workspace, version, allow.model), workspace.store.tensors(version.id)
    try:
        if version.recipe.get("peft") is not None:
            return convert_kept(spec, version.recipe["peft"], own, allow.rank)
        tensors = split_head(own)[0]
        return convert(spec, as_it_is(version, tensors), tensors, allow.rank)
    except NotConvertible as error:
        reason = str(error).partition("; export")[0]
        raise BadMerge(f"{ref} cannot be merged: {reason}") from error


def _check_layers(refs: Sequence[str], vectors: Sequence[Tensors]) -> None:
    """Refuse versions that adapt different layers.

    Raises:
        BadMerge: naming the first two, and a layer.
    """
    first = lora_layers(vectors[0]).keys()
    for ref, vector in zip(refs, vectors, strict=True):
        own = lora_layers(vector).keys()
        if own != first:
            odd = min(own ^ first)
            raise BadMerge(
                f"{refs[0]} and {ref} change different layers: {odd!r} is in "
                f"{ref if odd in own else refs[0]} only; --union merges all layers of either, and "
                "a layer that one has not counts as zero there"
            )


def _adapter(
    versions: Sequence[Version],
    shapes: Mapping[str, Sequence[int]],
    converted: Mapping[str, Conversion],
) -> dict[str, Any]:
    """Return the adapter that holds a merge: one that is merged, or plain LoRA.

    Raises:
        BadMerge: if whole parameters were trained that none of them holds.
    """
    own = [v.recipe["adapter"] for v in versions if v.id not in converted]
    if shapes:
        holding = [one for one in own if one["options"].get("bias", "none") != "none"]
        holding += [one for one in own if one["options"].get("modules_to_save")]
        kinds = {(o["options"]["bias"], *o["options"]["modules_to_save"]) for o in holding}
        if len(kinds) > 1:
            raise BadMerge(
                "the versions train different biases or modules whole, and no adapter holds all "
                "of these; merge versions of equal bias and modules_to_save"
            )
        return dict(holding[0])
    if own:
        last = widest(versions)
        return dict(last.recipe["adapter"] if last.id not in converted else own[0])
    return {"name": "lora", "options": ADAPTERS.get("lora").check({})}
