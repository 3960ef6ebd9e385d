"""What people do with aliases: promote, roll back, yank. Each move has an author and a reason."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.workspace import Workspace
from storage.aliases import AliasMove, NoReason, Yank
from storage.gates import Gates
from storage.refs import AmbiguousRef, quoted

if TYPE_CHECKING:
    from orchestrator.gating import Decision


class BadPointer(ValueError):
    """What should be NAME@ALIAS is not."""


class BadIntent(ValueError):
    """Options of a promotion that cannot be meant together."""


class GateFailed(ValueError):
    """The gate of an alias does not let a version pass.

    Attributes:
        decision: what it found.
        tried: what remedies were tried, as JSON; empty if none were asked for.
    """

    def __init__(self, decision: Decision, tried: Sequence[Mapping[str, Any]] = ()) -> None:
        self.decision, self.tried = decision, tuple(tried)
        checks = decision.failed
        said = "; ".join(f"{one.check}: {one.said}" for one in checks)
        super().__init__(
            f"{decision.pointer} was not moved to {decision.version[:12]}: {len(checks)} of "
            f"{len(decision.checks)} checks of its gate failed ({said})"
        )


@dataclass(frozen=True, slots=True)
class Intent:
    """Why an alias is moved, and how.

    Attributes:
        why: for the history.
        seen: the version that the alias is believed to point at; None for where it points now.
        force: why it is moved though its gate may not let the version pass; None if it is not.
        sign: name of the key that signs version and move once it is moved; None for none.
        tried: remedies that were tried before, as JSON.
    """

    why: str = ""
    seen: str | None = None
    force: str | None = None
    sign: str | None = None
    tried: tuple[Mapping[str, Any], ...] = ()


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
    """Point ``name@alias`` at a version, if the gate of that alias lets it pass.

    Args:
        workspace: where.
        name: whose alias.
        alias: which.
        ref: one of the name's versions.
        why: for the history.
        seen: the version that the alias is believed to point at; by default where it points now.

    Raises:
        UnknownVersion: if there is no such version.
        GateFailed: if the gate does not let it pass; nothing was moved.
        YankedVersion: if it is yanked.
        AliasMoved: if somebody else moved the alias meanwhile.
    """
    return promote_as(workspace, (name, alias), ref, Intent(why, seen))


def promote_as(
    workspace: Workspace, pointer: tuple[str, str], ref: str, intent: Intent
) -> AliasMove:
    """Point an alias at a version as :func:`promote` does; the gate may be overridden.

    What the gate found, and who overrode it from where, is kept with the move.

    Args:
        workspace: where.
        pointer: the name and the alias.
        ref: one of the name's versions.
        intent: why, and how.

    Raises:
        NoReason: if the gate is overridden without a reason.
        UnknownVersion, GateFailed, YankedVersion, AliasMoved: as :func:`promote`.
    """
    store, (name, alias) = workspace.store, pointer
    if intent.force is not None and not intent.force.strip():
        raise NoReason("a gate is overridden for a reason, got none; say it with --reason")
    expected = store.resolve(intent.seen) if intent.seen else store.pointing(name, alias)
    version = store.usable(name, ref)  # before anything is evaluated
    evidence = _evidence(workspace, pointer, version, intent)
    who = getpass.getuser()
    move = store.promote(
        name, alias, version, who=who, why=intent.why, expected=expected, evidence=evidence
    )
    _log(workspace, "promoted", move.version, {"name": name, "alias": alias, **_facts(move)})
    return move


def _evidence(
    workspace: Workspace, pointer: tuple[str, str], version: str, intent: Intent
) -> dict[str, Any] | None:
    """Return what is kept with a promotion; None where nothing is asked and nothing overridden.

    Raises:
        GateFailed: if the gate does not let the version pass, and is not overridden.
    """
    if Gates(workspace.engine).find(pointer[0]) is None:
        found: dict[str, Any] | None = None
    else:
        from orchestrator import gating  # it evaluates, and most names have no gate

        decision = gating.check(workspace, pointer, version, intent.sign)
        if decision is not None and not decision.passed and intent.force is None:
            raise GateFailed(decision)
        found = None if decision is None else decision.to_json()
    if found is None and intent.force is None:
        return None
    forced = None
    if intent.force is not None:
        forced = {
            "reason": intent.force,
            "who": getpass.getuser(),
            "host": socket.gethostname(),
        }
    asked = found or {"version": version, "gate": None, "passed": True, "checks": []}
    tried = {"tried": list(intent.tried)} if intent.tried else {}
    return {**asked, "forced": forced, **tried}


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
