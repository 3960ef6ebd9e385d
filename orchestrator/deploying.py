"""What people do with aliases: promote, roll back, yank. Each move has an author and a reason."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.workspace import Workspace
from storage.aliases import AliasMove, Yank
from storage.refs import AmbiguousRef, quoted


class BadPointer(ValueError):
    """What should be NAME@ALIAS is not."""


@dataclass(frozen=True, slots=True)
class YankResult:
    """A version that was yanked, or taken back.

    Attributes:
        yank: what was written down.
        aliases: such as ``bot@production``: those that point at the version and go on doing so.
    """

    yank: Yank
    aliases: tuple[str, ...]


def promote(
    workspace: Workspace, name: str, alias: str, ref: str, why: str = "", seen: str | None = None
) -> AliasMove:
    """Point ``name@alias`` at a version; the alias and the version's runs keep the history.

    Args:
        workspace: where.
        name: whose alias.
        alias: which.
        ref: one of the name's versions.
        why: for the history.
        seen: the version that the alias is believed to point at; by default where it points now.

    Raises:
        UnknownVersion: if there is no such version.
        YankedVersion: if it is yanked.
        AliasMoved: if somebody else moved the alias meanwhile.
    """
    store = workspace.store
    expected = store.resolve(seen) if seen else store.pointing(name, alias)
    move = store.promote(name, alias, ref, who=getpass.getuser(), why=why, expected=expected)
    _log(workspace, "promoted", move.version, {"name": name, "alias": alias, **_facts(move)})
    return move


def rollback(
    workspace: Workspace,
    pointer: str,
    to: str | None = None,
    why: str = "",
    seen: str | None = None,
) -> AliasMove:
    """Point an alias back at the version before, past those that were rolled back from.

    Args:
        workspace: where.
        pointer: ``NAME@ALIAS``.
        to: the version to go back to, if not the one before.
        why: for the history.
        seen: as :func:`promote`.

    Raises:
        BadPointer: if ``pointer`` is not of this form.
        UnknownVersion: if there is no such alias or version.
        NothingToRollBack: if nothing is left to go back to.
        YankedVersion, AliasMoved: as :func:`promote`.
    """
    store = workspace.store
    name, alias = parse_pointer(pointer)
    expected = store.resolve(seen or pointer)
    who = getpass.getuser()
    move = store.rollback(name, alias, to=to, who=who, why=why, expected=expected)
    for version in filter(None, (move.before, move.version)):
        _log(workspace, "rolled back", version, {"name": name, "alias": alias, **_facts(move)})
    return move


def yank(workspace: Workspace, ref: str, reason: str, undo: bool = False) -> YankResult:
    """Take a version out of use, or back into it.

    Args:
        workspace: where.
        ref: the version.
        reason: why; needed but for ``undo``.
        undo: whether to take it back into use.

    Raises:
        UnknownVersion: if there is no such version.
        NoReason: if there is no reason.
    """
    store, who = workspace.store, getpass.getuser()
    made = (store.unyank if undo else store.yank)(ref, who=who, why=reason)
    facts = {"version": made.version, "who": who, "why": reason}
    _log(workspace, "yanked" if made.yanked else "unyanked", made.version, facts)
    return YankResult(made, store.version(made.version).aliases)


def alias_log(workspace: Workspace, pointer: str) -> list[AliasMove]:
    """Return the moves of an alias, newest first.

    Raises:
        BadPointer: if ``pointer`` is not NAME@ALIAS.
        UnknownVersion: if there is no such alias.
    """
    name, alias = parse_pointer(pointer)
    workspace.store.resolve(pointer)
    return workspace.store.promotions(name, alias)


def parse_pointer(pointer: str) -> tuple[str, str]:
    """Return name and alias of ``NAME@ALIAS``.

    Raises:
        BadPointer: if it is not of this form.
    """
    name, _, alias = pointer.partition("@")
    if not name or not alias:
        raise BadPointer(
            f"an alias is written NAME@ALIAS, such as bot@production, got {quoted(pointer)}"
        )
    return name, alias


def _facts(move: AliasMove) -> dict[str, Any]:
    return {"from": move.before, "version": move.version, "who": move.who, "why": move.why}


def _log(workspace: Workspace, kind: str, version: str, facts: Mapping[str, Any]) -> None:
    """Tell the runs that ended in a version."""
    for run in workspace.ledger.runs_at(version):
        workspace.ledger.record(run, kind, facts)


def name_of(workspace: Workspace, ref: str) -> str:
    """Return the one name of a version.

    Raises:
        AmbiguousRef: if it has none or several.
    """
    names = sorted({name.partition(":")[0] for name in workspace.store.version(ref).names})
    if len(names) != 1:
        raise AmbiguousRef(f"{ref} has {len(names)} names ({', '.join(names)}); choose with --name")
    return names[0]
