"""Export: a version as a folder that others load, with its card, its manifest and a signature."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from clients.export import export_kept, export_peft
from clients.folders import whole_folder
from orchestrator.bases import base_of
from orchestrator.card import version_card
from orchestrator.manifest import write_manifest, write_signature
from orchestrator.merging import effective
from orchestrator.provenance import lineage
from orchestrator.signing import admitted, keys
from orchestrator.versions import refuse_unusable
from orchestrator.workspace import Workspace


def export(
    workspace: Workspace,
    ref: str,
    folder: str | Path,
    model: str | None = None,
    sign: str | None = None,
) -> list[Path]:
    """Write a version as a PEFT folder that peft, vLLM and the Hub load as is, whole or not at all.

    A stacked version is exported whole: its factors and those underneath, concatenated. One that
    was imported in PEFT's own format is exported in that.

    Args:
        workspace: where the version is.
        ref: the version.
        folder: where to; it must not exist or be empty.
        model: where its base model lies now, if not where it was last seen.
        sign: name of the key that signs the manifest, or None.

    Returns:
        The files, sorted.

    Raises:
        UnknownVersion: if there is no such version.
        FileExistsError: if the folder is not empty.
        Unsigned: if the signature policy does not let the version out.
        UnknownKey, BadKey: if the key is not here or cannot sign.
    """
    version = admitted(workspace, ref)
    kept = version.recipe.get("peft")
    if kept is None:
        refuse_unusable(version)
    spec = base_of(workspace, version, model)
    ancestry = lineage(workspace, version.id)
    card = version_card(version, ancestry.lineage, ancestry.epsilons)
    extra = {
        "version": version.id,
        "seen_labels": version.recipe["seen_labels"],
        "privacy": [asdict(one) for one in ancestry.epsilons],
    }
    with whole_folder(Path(folder)) as made:
        if kept is None:
            tensors = effective(workspace.store, version)
            facts = export_peft(made, tensors=tensors, spec=spec, card=card, extra=extra)
        else:
            as_they_are = workspace.store.tensors(version.id)
            facts = export_kept(made, as_they_are, kept, spec, card, extra)
        digest = write_manifest(made, facts)
        if sign is not None:
            write_signature(made, keys(workspace.home).sign("manifest", digest, sign))
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
