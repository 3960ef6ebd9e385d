"""Export: a version as a folder that others load, with its card, its manifest and a signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients.assignment import ModelSpec, PluginChoice
from clients.conversion import Conversion, convert, convert_kept, cut
from clients.even_ranks import NotPlain, evened
from clients.export import export_kept, export_peft, peft_files
from clients.folders import whole_folder
from clients.into_base import IntoBase, Trained, merge_into_base
from orchestrator.bases import base_of
from orchestrator.card import conversion_card, version_card
from orchestrator.manifest import write_manifest, write_signature
from orchestrator.merging import adapter_of, effective, split_head
from orchestrator.provenance import lineage
from orchestrator.signing import admitted, keys
from orchestrator.versions import as_it_is, refuse_unusable
from orchestrator.workspace import Workspace
from storage.lineage import Version
from strategies.base import Tensors


@dataclass(frozen=True, slots=True)
class AsLora:
    """That an export is to be plain LoRA, whatever the method.

    Attributes:
        rank: the most that a layer gets, >= 1. None keeps all of a low-rank adapter, and of any
            other 99 % of each layer, at a rank of 64 at most.
    """

    rank: int | None = None


@dataclass(frozen=True, slots=True)
class ForVllm:
    """That an export is to be what vLLM serves: plain LoRA of a causal model, of one rank.

    Attributes:
        rank: the most that a layer gets of what is converted or cut, >= 1. None converts nothing.
    """

    rank: int | None = None


class NotServable(ValueError):
    """vLLM cannot serve this version as an adapter."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: sorted.
        converted: what LoRA keeps of the version, or None where nothing was converted.
        merged: how well the merged model agrees (:class:`clients.agreement.Agreement`, and the
            ``dtype``), or None where the adapter went out by itself.
    """

    files: tuple[Path, ...]
    converted: Conversion | None
    merged: Mapping[str, Any] | None = None


def export(
    workspace: Workspace,
    ref: str,
    folder: str | Path,
    model: str | None = None,
    sign: str | None = None,
    to: AsLora | IntoBase | ForVllm | None = None,
) -> Exported:
    """Write a version as a PEFT folder that peft, vLLM and the Hub load as is, whole or not at all.

    A stacked version is exported whole: its factors and those underneath, concatenated. One that
    was imported in PEFT's own format is exported in that, if not ``to`` LoRA.

    Args:
        workspace: where the version is.
        ref: the version.
        folder: where to; it must not exist or be empty.
        model: where its base model lies now, if not where it was last seen.
        sign: name of the key that signs the manifest, or None.
        to: whether to convert it to LoRA; how much of it that keeps is in ``weft.json``, the
            manifest and the model card. Or whether to write the base model with the adapter in its
            weights, instead of a PEFT folder. Or whether it is for vLLM.

    Raises:
        UnknownVersion: if there is no such version.
        FileExistsError: if the folder is not empty.
        Unsigned: if the signature policy does not let the version out.
        UnknownKey, BadKey: if the key is not here or cannot sign.
        clients.conversion.NotConvertible: if the version cannot be LoRA, with the reason.
        clients.into_base.NotMergeable: if it cannot go into the weights, with the reason.
        NotServable: if vLLM cannot serve it, with the reason.
        clients.agreement.MergeIsOff: if the merged model does not compute the same.
    """
    version = admitted(workspace, ref)
    kept = version.recipe.get("peft")
    if kept is None:
        refuse_unusable(version)
    spec = base_of(workspace, version, model)
    tensors: Tensors | None = None
    if kept is None:
        tensors = effective(workspace.store, version)
    with whole_folder(Path(folder)) as made:
        converted = None
        if isinstance(to, AsLora) or (isinstance(to, ForVllm) and to.rank):
            converted = _converted(workspace, version, spec, tensors, to.rank)
        if isinstance(to, ForVllm):
            tensors, converted = _even(version, spec, tensors, converted)
        if isinstance(to, IntoBase):
            card, extra = _said(workspace, version)
            trained = _trained(workspace, version, spec, tensors)
            facts = merge_into_base(made, trained, to, card, extra)
        else:
            facts = _fill(made, workspace, version, spec, tensors, converted)
        digest = write_manifest(made, facts)
        if sign is not None:
            write_signature(made, keys(workspace.home).sign("manifest", digest, sign))
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return Exported(tuple(files), converted, facts.get("merged"))


def _fill(
    folder: Path,
    workspace: Workspace,
    version: Version,
    spec: ModelSpec,
    tensors: Tensors | None,
    converted: Conversion | None,
) -> dict[str, Any]:
    """Write what PEFT reads and what there is to say; return what ``weft.json`` says.

    ``tensors`` is all that a version does, or None where it is in PEFT's own format.
    """
    card, extra = _said(workspace, version)
    if converted is not None:
        card += "\n\n" + conversion_card(converted)
        extra["converted"] = converted.facts()
    if tensors is not None:
        head = split_head(tensors)[1]
        whole = tensors if converted is None else {**converted.tensors, **head}
        return export_peft(folder, tensors=whole, spec=spec, card=card, extra=extra)
    named, config = workspace.store.tensors(version.id), version.recipe["peft"]
    if converted is not None:
        named, config = peft_files(converted.tensors, spec)
    return export_kept(folder, named, config, spec, card, extra)


def _even(
    version: Version, spec: ModelSpec, tensors: Tensors | None, converted: Conversion | None
) -> tuple[Tensors | None, Conversion | None]:
    """Return tensors and conversion with one rank and scaling for all layers."""
    if spec.kind != "causal-lm":
        raise NotServable(
            f"{version.id[:12]} is a {spec.kind} model, and vLLM serves adapters of causal-lm "
            "models; serve it with: weft serve"
        )
    if converted is not None:
        return tensors, replace(converted, tensors=evened(converted.tensors))
    try:
        if tensors is None:
            raise NotPlain("it is kept in PEFT's own format")
        return evened(tensors), None
    except NotPlain as reason:
        raise NotServable(
            f"vLLM serves plain LoRA, and {version.id[:12]} "
            f"({version.recipe['adapter']['name']}) is not: {reason}; convert it with --rank R"
        ) from None


def _said(workspace: Workspace, version: Version) -> tuple[str, dict[str, Any]]:
    """Return what the card says of a version, and what ``weft.json`` does."""
    ancestry = lineage(workspace, version.id)
    card = version_card(version, ancestry.lineage, ancestry.epsilons)
    return card, {
        "version": version.id,
        "seen_labels": version.recipe["seen_labels"],
        "privacy": [asdict(one) for one in ancestry.epsilons],
    }


def _trained(
    workspace: Workspace, version: Version, spec: ModelSpec, tensors: Tensors | None
) -> Trained:
    """Return what goes into the base model; ``tensors`` as :func:`_fill`."""
    if tensors is None:
        choice = PluginChoice(version.recipe["adapter"]["name"], {})
        own = workspace.store.tensors(version.id)
        return Trained(spec, choice, own, version.recipe["peft"])
    return Trained(spec, as_it_is(version, tensors), tensors)


def _converted(
    workspace: Workspace,
    version: Version,
    spec: ModelSpec,
    tensors: Tensors | None,
    rank: int | None,
) -> Conversion:
    """Return a version as LoRA; ``tensors`` as :func:`_fill`."""
    if tensors is None:
        own = workspace.store.tensors(version.id)
        return convert_kept(spec, version.recipe["peft"], own, rank)
    adapter = split_head(tensors)[0]
    if "low-rank" in adapter_of(version).capabilities:
        return cut(version.recipe["adapter"]["name"], adapter, rank)
    return convert(spec, as_it_is(version, adapter), adapter, rank)
