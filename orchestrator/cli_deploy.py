"""``weft promote``, ``rollback``, ``gate`` and ``followers``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.terminal import JsonFlag, err, out, print_json, workspace_here

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.coordinator import Driving
    from orchestrator.federation import Observe
    from orchestrator.gating import Decision
    from orchestrator.remedy_runs import Replay
    from storage.aliases import AliasMove

gate_app = typer.Typer(help="What is asked of a version.", no_args_is_help=True)
followers_app = typer.Typer(help="Servers that follow aliases.", no_args_is_help=True)

NOT_PASSED, NOT_CONFIRMED = 1, 3

Why = Annotated[str, typer.Option("--why", help="For the history.")]
Seen = Annotated[
    str | None,
    typer.Option("--from", help="Where it points, as you know; refused if that has changed."),
]
Sign = Annotated[
    str | None, typer.Option("--sign", help="Key that signs the move and the version.")
]
Wait = Annotated[
    str, typer.Option("--wait", help="For the servers that follow it: 30s, 2m, 0 for not at all.")
]


def promote(  # noqa: PLR0913  (one option each)
    ref: str,
    to: Annotated[str, typer.Option("--to", help="The alias, such as production.")],
    name: Annotated[str | None, typer.Option(help="The name the alias belongs to.")] = None,
    why: Why = "",
    seen: Seen = None,
    sign: Sign = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though the gate fails; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why it is forced.")] = "",
    remedy: Annotated[
        bool, typer.Option("--remedy", help="If the gate fails, try merges, then replay.")
    ] = False,
    by: Annotated[
        Literal["merge", "replay"] | None, typer.Option("--by", help="Of --remedy, this alone.")
    ] = None,
    wait: Wait = "30s",
    as_json: JsonFlag = False,
) -> None:
    """Point NAME@ALIAS at a version that its gate lets pass."""
    from functools import partial

    from orchestrator import deploying, signing

    seconds = _seconds(wait)
    if reason and not force:
        raise deploying.BadIntent("--reason is for --force; give both, or say --why")
    if remedy and force:
        raise deploying.BadIntent("--remedy tries to pass the gate, --force does not; give one")
    if by and not remedy:
        raise deploying.BadIntent(f"--by {by} chooses among remedies; give --remedy too")
    workspace = workspace_here()
    owner = name or deploying.name_of(workspace, ref)
    intent = deploying.Intent(why, seen, reason if force else None, sign)
    try:
        how = _remedied(by, as_json) if remedy else deploying.promote_as
        promoted = partial(how, workspace, (owner, to), ref, intent)
        move = signing.signed(workspace, f"{owner}@{to}", sign, promoted)
    except deploying.GateFailed as failed:
        _refused(failed, as_json)
        raise typer.Exit(NOT_PASSED) from None
    if not as_json:
        for one in (move.evidence or {}).get("tried", ()):
            out.print(f"tried {one['what']}: {one['said']}", highlight=False, markup=False)
        out.print(f"{owner}@{to}  {move.version}", highlight=False, markup=False)
    _await(workspace, (owner, to), move, seconds, as_json)


def _remedied(by: Literal["merge", "replay"] | None, as_json: bool) -> Callable[..., AliasMove]:
    """Return what promotes a version or its best remedy; a run that remedies is shown."""
    from functools import partial

    from orchestrator.remedies import promote_or_remedy

    running = partial(_running, err if as_json else out)
    return partial(promote_or_remedy, kinds=(by,) if by else ("merge", "replay"), running=running)


@contextmanager
def _running(console: Console, replay: Replay) -> Iterator[tuple[Observe, Driving]]:
    """Say what a run will be, show how it goes on, and let it be stopped."""
    from orchestrator.cli_runs import stopped_by_signals
    from orchestrator.coordinator import Driving, Stopped
    from orchestrator.progress import RunProgress

    console.print(f"trying {replay}", highlight=False, markup=False)
    stop, progress = threading.Event(), RunProgress(console)
    with stopped_by_signals(stop), progress:
        try:
            yield progress, Driving(stop=stop)
        except Stopped:
            err.print("stopped; go on with the same command", style="dim")
            raise typer.Exit(130) from None


def rollback(  # noqa: PLR0913  (one option each)
    pointer: Annotated[str, typer.Argument(metavar="NAME@ALIAS")],
    to: Annotated[
        str | None, typer.Option("--to", help="A version, if not the one before.")
    ] = None,
    why: Why = "",
    seen: Seen = None,
    sign: Sign = None,
    wait: Wait = "30s",
    as_json: JsonFlag = False,
) -> None:
    """Point NAME@ALIAS back at the version before, and wait for the servers that follow it."""
    from functools import partial

    from orchestrator import deploying, signing

    workspace = workspace_here()
    seconds = _seconds(wait)
    back = partial(deploying.rollback, workspace, pointer, to, why, seen)
    move = signing.signed(workspace, pointer, sign, back)
    left = (move.before or "")[:12]
    if not as_json:
        out.print(f"{pointer}  {move.version}  (was {left})", highlight=False, markup=False)
    _await(workspace, deploying.parse_pointer(pointer), move, seconds, as_json)


def _await(
    workspace: Any, pointer: tuple[str, str], move: AliasMove, wait_s: float, as_json: bool
) -> None:
    """Wait for who follows, say who has confirmed, and exit with 3 if somebody has not."""
    from orchestrator import following, views
    from storage.database import DatabaseUnavailable

    try:
        found = following.await_followers(workspace, pointer, move.version, wait_s)
    except DatabaseUnavailable as error:
        told = f"{'@'.join(pointer)} was moved, and who follows cannot be told any more: {error}"
        err.print(told, highlight=False, markup=False)
        if as_json:
            print_json({**views.move_json(move), "followers": None})
        raise typer.Exit(NOT_CONFIRMED) from None
    if as_json:
        print_json({**views.move_json(move), "followers": found.to_json()})
    else:
        shown = out if found.confirmed or not found.is_complete else err
        for line in following.lines(found):
            shown.print(line, highlight=False, markup=False)
    if not found.is_complete:
        raise typer.Exit(NOT_CONFIRMED)


def _seconds(text: str) -> float:
    """Return the seconds in a time such as ``30s``, ``2m`` or ``0``.

    Raises:
        BadConfig: if it is none.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m") else (text, "s")
    if not number.replace(".", "", 1).isdecimal():
        from orchestrator.config import BadConfig

        raise BadConfig(f"--wait takes a time such as 30s, 2m or 0, got {text!r}")
    return float(number) * (60 if unit == "m" else 1)


def _refused(failed: Any, as_json: bool) -> None:
    if as_json:
        print_json({**failed.decision.to_json(), "moved": False, "tried": list(failed.tried)})
        return
    _print_checks(failed.decision)
    for one in failed.tried:
        err.print(f"tried {one['what']}: {one['said']}", highlight=False, markup=False)
    err.print(
        f"{failed.decision.pointer} was not moved: "
        f"{len(failed.decision.failed)} of {len(failed.decision.checks)} checks failed",
        style="red",
        highlight=False,
        markup=False,
    )


def _print_checks(decision: Decision) -> None:
    from orchestrator.gate_report import checks_table

    out.print(checks_table(decision))


# --- gates ------------------------------------------------------------------------------------


@gate_app.command("set")
def gate_set(name: str, file: Path, why: Why = "", as_json: JsonFlag = False) -> None:
    """Give NAME a gate: its evaluation suite, and what is asked for each alias."""
    import getpass

    from orchestrator.gate_file import read_gate
    from orchestrator.gate_setting import set_gate

    row = set_gate(workspace_here(), name, read_gate(file), getpass.getuser(), why)
    _show_gate(row, as_json)


@gate_app.command("show")
def gate_show(
    name: str,
    history: Annotated[bool, typer.Option("--history", help="What it was.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the gate of NAME, or its history."""
    from orchestrator.gate_report import gate_json, gates_table
    from storage.gates import Gates

    gates = Gates(workspace_here().engine)
    if not history:
        _show_gate(gates.get(name), as_json)
        return
    rows = gates.history(name)
    if as_json:
        print_json([gate_json(row) for row in rows])
    else:
        out.print(gates_table(rows))


@gate_app.command("remove")
def gate_remove(name: str, why: Why = "") -> None:
    """Ask nothing any more of the versions of NAME; the history stays."""
    import getpass

    from storage.gates import Gates

    row = Gates(workspace_here().engine).set(name, None, who=getpass.getuser(), why=why)
    out.print(f"{name}  gate {row.number}: removed", highlight=False, markup=False)


@gate_app.command("check")
def gate_check(
    ref: str,
    alias: Annotated[str, typer.Option("--alias", help="As if it were promoted to this one.")],
    name: Annotated[str | None, typer.Option(help="The name the alias belongs to.")] = None,
    sign: Sign = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a version would pass, and if not by how much; move nothing."""
    from orchestrator import deploying, gating

    workspace = workspace_here()
    owner = name or deploying.name_of(workspace, ref)
    decision = gating.check(workspace, (owner, alias), ref, sign)
    if decision is None:
        if as_json:
            print_json({"pointer": f"{owner}@{alias}", "gate": None, "passed": True, "checks": []})
        else:
            out.print(f"nothing is asked for {owner}@{alias}", highlight=False, markup=False)
        return
    if as_json:
        print_json(decision.to_json())
    else:
        _print_checks(decision)
    if not decision.passed:
        raise typer.Exit(NOT_PASSED)


def _show_gate(row: Any, as_json: bool) -> None:
    from orchestrator.gate_report import gate_json, gate_text

    if as_json:
        print_json(gate_json(row))
    else:
        out.print(gate_text(row), highlight=False, markup=False)


# --- followers --------------------------------------------------------------------------------


@followers_app.command("list")
def followers_list(
    pointer: Annotated[str | None, typer.Argument(metavar="NAME@ALIAS")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the servers that follow an alias, or any, and what each serves."""
    from dataclasses import asdict

    from orchestrator.deploying import parse_pointer
    from orchestrator.gate_report import followers_table
    from storage.followers import Followers

    name, alias = parse_pointer(pointer) if pointer else (None, None)
    found = Followers(workspace_here().engine).following(name, alias)
    if as_json:
        times = ("registered_at", "seen_at")
        rows = [asdict(one) for one in found]
        print_json([{k: v.isoformat() if k in times else v for k, v in r.items()} for r in rows])
    else:
        out.print(followers_table(found))


@followers_app.command("forget")
def followers_forget(server: str) -> None:
    """Wait no more for a server that is gone; one that lives registers again."""
    from storage.followers import Followers, UnknownFollower

    if not Followers(workspace_here().engine).forget(server):
        raise UnknownFollower(f"no server is registered as {server!r}; weft followers list")
    out.print(f"{server}  forgotten", highlight=False, markup=False)
