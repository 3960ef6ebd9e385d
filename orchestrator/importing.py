"""Import: somebody's PEFT folder as a version, with what is known of where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.importing import Imported, NotImportable, read_peft
from orchestrator.bases import remember_base
from orchestrator.manifest import MANIFEST, check_manifest
from orchestrator.recipes import import_recipe
from orchestrator.signing import heed, keys, policy
from orchestrator.workspace import Workspace
from storage.refs import UnknownVersion, check_name


@dataclass(frozen=True, slots=True)
class Arrival:
    """What an import made.

    Attributes:
        version: its id.
        name: such as ``support-bot:v3``.
        parent: the version of this store that the folder is the unaltered export of, or None.
        kept: why the adapter stays in PEFT's own format, where it can only be exported and
            deployed; "" where it can also be trained on, merged and scored.
    """

    version: str
    name: str
    parent: str | None
    kept: str


def import_adapter(
    workspace: Workspace,
    folder: str | Path,
    name: str,
    base: str | None = None,
    labels: Sequence[str] = (),
) -> Arrival:
    """Make a PEFT adapter folder a version. The same folder is the same version.

    The digests of the files are in its recipe. Where the folder is the unaltered export of a
    version of this store, that is its parent, and so its privacy spends are inherited.

    Args:
        workspace: where to.
        folder: the adapter's.
        name: the name that the version gets.
        base: where the base model is; by default where the folder says.
        labels: of a sequence classifier that weft did not export, in index order.

    Raises:
        BadName: if it cannot be a name.
        NotImportable: if it is no adapter that weft takes, or was altered after its export.
        Unsigned: if the signature policy wants a signed manifest.
        BadTensor: if a tensor holds a value that is not finite.
    """
    check_name("name", name)
    source = Path(folder)
    declared = _declared(workspace, source)
    found = read_peft(source, base, labels)
    parent = _parent(workspace, source, found, declared)
    recipe = import_recipe(
        found.model, found.adapter, found.seen_labels, _source(found, declared), found.peft
    )
    version = workspace.store.commit(
        found.tensors, parents={parent: "import"} if parent else {}, recipe=recipe
    )
    remember_base(workspace, found.model)
    return Arrival(version, workspace.store.name(name, version), parent, found.why)


def _declared(workspace: Workspace, folder: Path) -> str | None:
    """Return the version that an intact manifest says the folder is, or None without manifest.

    Raises:
        NotImportable: if the folder differs from its manifest.
        Unsigned: if the policy wants a signature that is not there.
    """
    remedy = "export REF DIR --sign KEY, where it comes from"
    if not (folder / MANIFEST).exists():
        if policy(workspace.home) != "off":
            heed(workspace.home, f"{folder} has no manifest, so no signature", remedy)
        return None
    checked = check_manifest(folder, keys(workspace.home).keys())
    if checked.problems:
        raise NotImportable(
            f"{folder} is not what was exported: {checked.problems[0]}; export it again, or remove "
            f"{MANIFEST} to import it as an adapter of unknown origin"
        )
    if checked.signer is None:
        heed(workspace.home, f"{folder} has no signature by a trusted key", remedy)
    return checked.version


def _parent(
    workspace: Workspace, folder: Path, found: Imported, declared: str | None
) -> str | None:
    """Return the version of this store that the folder is the export of, or None.

    Raises:
        NotImportable: if it changed while it was read.
    """
    if declared is None:
        return None
    listed = check_manifest(folder).facts["files"]
    if any(listed.get(name) != digest for name, digest in found.files.items()):
        raise NotImportable(f"{folder} changed while it was read; import it again")
    try:
        return declared if workspace.store.resolve(declared) == declared else None
    except UnknownVersion:
        return None


def _source(found: Imported, declared: str | None) -> dict[str, Any]:
    return {"files": dict(found.files), "version": declared}
