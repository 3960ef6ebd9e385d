"""Signatures of versions and alias moves, and what is refused without them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from clients.files import write_durably
from orchestrator.manifest import Checked, check_manifest
from orchestrator.workspace import Workspace
from storage.aliases import AliasMove
from storage.canonical import canonical_json
from storage.keys import Key, KeyRing, public_key
from storage.lineage import Version
from storage.signatures import SignatureStore
from storage.store import AdapterStore

Policy: TypeAlias = Literal["off", "warn", "require"]
"""What is done about a version without a signature by a trusted key; from lax to strict."""

POLICY_VARIABLE = "WEFT_SIGNATURES"
_POLICIES: tuple[Policy, ...] = get_args(Policy)
_LOG = logging.getLogger(__name__)


class BadPolicy(ValueError):
    """A signature policy that there is not."""


class Unsigned(ValueError):
    """Something has no signature by a trusted key, and the policy requires one."""


def keys(home: Path) -> KeyRing:
    """Return the keys of a weft home."""
    return KeyRing(home / "keys")


def policy(home: Path) -> Policy:
    """Return the policy of a home: the stricter of ``keys/policy`` and ``$WEFT_SIGNATURES``.

    Raises:
        BadPolicy: if one of them is none: a policy that cannot be read allows nothing.
    """
    path = home / "keys" / "policy"
    said = {str(path): path.read_text("utf-8").strip()} if path.exists() else {}
    if os.environ.get(POLICY_VARIABLE):
        said[f"${POLICY_VARIABLE}"] = os.environ[POLICY_VARIABLE]
    return max(
        (_policy(text, where) for where, text in said.items()), key=_strictness, default="off"
    )


def set_policy(home: Path, chosen: str) -> Policy:
    """Write the policy of a home down, and return what holds from now on.

    Raises:
        BadPolicy: if it is none.
    """
    checked = _policy(chosen, "the signature policy")
    folder = home / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    write_durably(folder / "policy", f"{checked}\n".encode())
    return policy(home)


def _policy(text: str, where: str) -> Policy:
    for one in _POLICIES:
        if text == one:
            return one
    raise BadPolicy(f"{where} must be one of {', '.join(_POLICIES)}, got {text!r}")


def _strictness(one: Policy) -> int:
    return _POLICIES.index(one)


def sign(workspace: Workspace, ref: str, key: str | None = None) -> dict[str, str]:
    """Sign the version that ``ref`` names; of ``NAME@ALIAS``, the alias's last move too.

    Args:
        workspace: where.
        ref: the version.
        key: name of the key; None is the only one that can sign here.

    Returns:
        What was signed, by kind: ``version`` and perhaps ``alias``.

    Raises:
        UnknownVersion: if there is no such version.
        UnknownKey, BadKey: if there is no such key, or it cannot sign here.
    """
    subjects = {"version": workspace.store.version(ref).id} | _moves(workspace.store, ref)
    _sign(workspace, subjects, key)
    return subjects


def signed(
    workspace: Workspace, pointer: str, key: str | None, move: Callable[[], AliasMove]
) -> AliasMove:
    """Move an alias, and sign that very move and the version that it points at from then on.

    Another's move that comes between is not signed. After a crash between the move and the
    signature the move is unsigned: sign the alias then.

    Args:
        workspace: where.
        pointer: ``NAME@ALIAS``.
        key: name of the key; None signs nothing.
        move: does it.

    Raises:
        UnknownKey, BadKey: if there is no such key, or it cannot sign here; nothing is moved then.
    """
    if key is None:
        return move()
    keys(workspace.home).check(key)
    made = move()
    _sign(workspace, {"version": made.version, "alias": _digest(pointer, made)}, key)
    return made


def _sign(workspace: Workspace, subjects: Mapping[str, str], key: str | None) -> None:
    ring, kept = keys(workspace.home), SignatureStore(workspace.engine)
    made = {kind: ring.sign(kind, subject, key) for kind, subject in subjects.items()}
    for kind, subject in subjects.items():
        kept.add(kind, subject, made[kind])


def signers(workspace: Workspace, ref: str) -> dict[str, Key | None]:
    """Return which trusted key signed the version that ``ref`` names, and the alias's last move.

    Raises:
        UnknownVersion: if there is no such version.
    """
    subjects = {"version": workspace.store.version(ref).id} | _moves(workspace.store, ref)
    ring, kept = keys(workspace.home), SignatureStore(workspace.engine)
    return {
        kind: ring.signer(kind, subject, kept.of(kind, subject))
        for kind, subject in subjects.items()
    }


def admitted(workspace: Workspace, ref: str) -> Version:
    """Return the version that ``ref`` names, to be loaded or exported, if the policy allows it.

    Raises:
        UnknownVersion: if there is no such version.
        Unsigned: if the policy is ``require`` and it, or the move of the alias that it is named
            by, has no signature by a trusted key.
        BadPolicy, BadKey: if policy or keys cannot be read.
    """
    version = workspace.store.version(ref)
    if policy(workspace.home) != "off":
        for kind, signer in signers(workspace, ref).items():
            if signer is None:
                what = (
                    f"the last move of {ref}" if kind == "alias" else f"version {version.id[:12]}"
                )
                heed(workspace.home, f"{what} has no signature by a trusted key", f"sign {ref}")
    return version


def heed(home: Path, problem: str, remedy: str) -> None:
    """Refuse, or warn of, what lacks a signature, as the policy has it.

    Args:
        home: whose policy.
        problem: what is wrong.
        remedy: the command that mends it, without ``weft``.

    Raises:
        Unsigned: if the policy is ``require``.
    """
    found = policy(home)
    if found == "require":
        raise Unsigned(f"{problem}, and the policy requires one; sign it with: weft {remedy}")
    if found == "warn":
        _LOG.warning("%s; sign it with: weft %s", problem, remedy)


def _moves(store: AdapterStore, ref: str) -> dict[str, str]:
    """Return what covers the last move of the alias in ``ref``; empty where it names none."""
    name, at, alias = ref.partition("@")
    if not at:
        return {}
    return {"alias": _digest(ref, store.promotions(name, alias)[0])}


def _digest(pointer: str, move: AliasMove) -> str:
    """Return what covers a move of ``NAME@ALIAS``."""
    name, _, alias = pointer.partition("@")
    document = {
        "name": name,
        "alias": alias,
        "from": move.before,
        "to": move.version,
        "who": move.who,
        "when": move.created_at.isoformat(),
        "why": move.why,
        **({} if move.evidence is None else {"evidence": move.evidence}),
    }
    return hashlib.sha256(canonical_json(document, "the move").encode()).hexdigest()


def verify_folder(home: Path, folder: Path, public: Sequence[str]) -> tuple[Checked, list[str]]:
    """Check an exported folder, without a database.

    Args:
        home: whose trusted keys and policy hold, where no key is given.
        folder: the export.
        public: public keys, one of which must have signed it.

    Returns:
        What it is, and a sentence for each problem.

    Raises:
        NoManifest, BadManifest: if it has none.
        BadKey: if a key is none.
    """
    given = [public_key(one) for one in public]
    checked = check_manifest(folder, given or keys(home).keys())
    problems = list(checked.problems)
    if checked.signer is None and (given or policy(home) == "require"):
        problems.append(
            f"none of its {checked.signatures} signatures is good and by a trusted key"
            if checked.signatures
            else "it is not signed; export it with --sign KEY"
        )
    return checked, problems
