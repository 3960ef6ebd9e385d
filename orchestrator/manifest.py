"""The manifest of an exported folder: which files it holds, and who says so. Needs no database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.canonical import canonical_json
from storage.keys import Key, Signature, trusted_signer

MANIFEST, SIGNATURES = "weft-manifest.json", "weft-manifest.sig.json"
_FORMAT = "weft-manifest-1"


class NoManifest(LookupError):
    """A folder has no manifest."""


class BadManifest(ValueError):
    """A manifest that is none."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a folder is against its manifest.

    Attributes:
        version: id of the version that was exported.
        facts: what the manifest says.
        problems: a sentence for each file that is missing, altered or not listed.
        signer: the trusted key that signed it, or None.
        signatures: how many signatures it has, trusted or not.
    """

    version: str
    facts: Mapping[str, Any]
    problems: tuple[str, ...]
    signer: Key | None
    signatures: int


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> str:
    """Write the manifest of all files in ``folder`` and return its sha256, which is what is signed.

    Args:
        folder: the export.
        facts: what ``weft.json`` says: ``version``, ``base`` and ``tokenizer`` are taken, and of a
            ``converted`` adapter from which method it is and the energy that was kept.
    """
    converted = facts.get("converted")
    document = {
        "format": _FORMAT,
        "version": facts["version"],
        "base": {key: facts["base"][key] for key in ("id", "revision", "hash")},
        "tokenizer": facts["tokenizer"],
        "files": {name: _sha256(folder / name) for name in _files(folder)},
        **({"converted": {k: converted[k] for k in ("from", "energy")}} if converted else {}),
    }
    text = canonical_json(document, "the manifest")
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return _sha256(folder / MANIFEST)


def write_signature(folder: Path, signature: Signature) -> None:
    """Put a signature beside the manifest, with those that are there; one of a key at most."""
    kept = [one for one in _signatures(folder) if one.key != signature.key]
    document = [{"key": s.key, "signature": s.signature} for s in sorted([*kept, signature])]
    text = canonical_json({"signatures": document}, "the signatures")
    (folder / SIGNATURES).write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path, trusted: Iterable[Key] = ()) -> Checked:
    """Hash every file of ``folder`` and say how it differs from its manifest.

    Hidden files, such as Git's, are no part of an export.

    Raises:
        NoManifest: if there is none.
        BadManifest: if it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NoManifest(f"{folder} has no {MANIFEST}; weft export writes one")
    data = path.read_bytes()  # once: what is parsed is what is hashed
    document = _document(path, data)
    listed: dict[str, str] = document["files"]
    there = set(_files(folder))
    problems = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    problems += [f"{name} is not in the manifest" for name in sorted(there - listed.keys())]
    problems += [
        f"{name} was altered: it has sha256 {found[:12]}…, the manifest says {listed[name][:12]}…"
        for name in sorted(listed.keys() & there)
        if (found := _sha256(folder / name)) != listed[name]
    ]
    signatures = _signatures(folder)
    digest = hashlib.sha256(data).hexdigest()
    signer = trusted_signer(trusted, "manifest", digest, signatures)
    return Checked(document["version"], document, tuple(problems), signer, len(signatures))


def _files(folder: Path) -> list[str]:
    """Return the files of an export, but for the manifest, its signatures and hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    own = (MANIFEST, SIGNATURES)
    return sorted(
        str(name.as_posix())
        for name in names
        if str(name) not in own and not any(part.startswith(".") for part in name.parts)
    )


def _document(path: Path, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
        files = document["files"]
        right = document["format"] == _FORMAT and isinstance(document["version"], str)
        right &= all(isinstance(text, str) for item in files.items() for text in item)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise BadManifest(f"{path} is not a manifest of format {_FORMAT}; export the version anew")
    return dict(document)


def _signatures(folder: Path) -> list[Signature]:
    path = folder / SIGNATURES
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())["signatures"]
        return [Signature(str(row["key"]), str(row["signature"])) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadManifest(f"{path} holds no signatures; sign the export anew") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
