"""Whether the servers that follow an alias serve what it points at now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.workspace import Workspace
from storage.followers import Follower, Followers

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Following:
    """Who follows an alias, and how far they are.

    Attributes:
        pointer: ``NAME@ALIAS``.
        version: id of the version that they are to serve.
        confirmed: those that said they answer with it, and with nothing else.
        behind: those that are live and have not.
        silent: those that were not heard of for longer than they said they would be, and had not
            confirmed: dead, or serving we do not know what.
    """

    pointer: str
    version: str
    confirmed: tuple[Follower, ...]
    behind: tuple[Follower, ...]
    silent: tuple[Follower, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all have confirmed; also where nobody follows."""
        return not (self.behind or self.silent)

    def to_json(self) -> dict[str, Any]:
        """Return who is how far as JSON."""
        return {
            "version": self.version,
            "complete": self.is_complete,
            "confirmed": [_follower_json(one) for one in self.confirmed],
            "behind": [_follower_json(one) for one in self.behind],
            "silent": [_follower_json(one) for one in self.silent],
        }


def following(workspace: Workspace, pointer: tuple[str, str], version: str) -> Following:
    """Return who follows an alias, and how far they are with a version (by its id)."""
    confirmed: list[Follower] = []
    behind: list[Follower] = []
    silent: list[Follower] = []
    for one in Followers(workspace.engine).following(*pointer):
        # one that confirmed and fell silent stays there: it goes on with what it has
        there = confirmed if one.version == version else behind if one.is_live else silent
        there.append(one)
    found = (tuple(confirmed), tuple(behind), tuple(silent))
    return Following("@".join(pointer), version, *found)


def await_followers(
    workspace: Workspace, pointer: tuple[str, str], version: str, wait_s: float
) -> Following:
    """Wait until the live servers that follow an alias have confirmed a version (by its id).

    Silent ones are not waited for. Ends early if the alias is moved on meanwhile.

    Args:
        workspace: where.
        pointer: the name and the alias.
        version: what they are to serve.
        wait_s: seconds to wait at most, >= 0.
    """
    until = time.monotonic() + wait_s
    while True:
        found = following(workspace, pointer, version)
        left = until - time.monotonic()
        moved = workspace.store.pointing(*pointer) != version
        if not found.behind or left <= 0 or moved:
            return found
        time.sleep(min(_LOOK_EVERY_S, left))


def lines(found: Following) -> list[str]:
    """Return who is how far, a line each; of nobody, that."""
    if found.is_complete and not found.confirmed:
        return [f"no server follows {found.pointer}"]
    told = [f"{one.url}  confirmed" for one in found.confirmed]
    for one in found.behind:
        why = f": {one.problem}" if one.problem else ""
        told.append(f"{one.url}  HAS NOT CONFIRMED, serves {_serves(one)}{why}")
    for one in found.silent:
        when = one.seen_at.strftime("%Y-%m-%d %H:%M:%S UTC")
        told.append(
            f"{one.url}  SILENT since {when}, served {_serves(one)}; if it is gone for good: "
            f"weft followers forget {one.server}"
        )
    return told


def _serves(one: Follower) -> str:
    return one.version[:12] if one.version else "what it has not said"


def _follower_json(one: Follower) -> dict[str, Any]:
    return {
        "server": one.server,
        "url": one.url,
        "version": one.version,
        "problem": one.problem,
        "seen_at": one.seen_at.isoformat(),
    }
