"""``weft names``, ``versions``, ``yank`` and ``alias``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.terminal import JsonFlag, out, print_json, workspace_here

alias_app = typer.Typer(help="Look at aliases.", no_args_is_help=True)


def yank(
    ref: str,
    reason: Annotated[str, typer.Option("--reason", help="Why it must not be used.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Take it back into use.")] = False,
) -> None:
    """Take a bad version out of use; it stays in the history."""
    from orchestrator import deploying

    done = deploying.yank(workspace_here(), ref, reason, undo)
    word = "yanked" if done.yank.yanked else "in use again"
    out.print(f"{done.yank.version}  {word}", highlight=False, markup=False)
    for pointer in done.aliases if done.yank.yanked else ():
        out.print(
            f"{pointer} still points at it; go back with: weft rollback {pointer}",
            highlight=False,
            markup=False,
        )


def names(
    prefix: Annotated[str, typer.Argument(help="With which they begin.")] = "",
    after: Annotated[str, typer.Option(help="The last name of the page before.")] = "",
    limit: Annotated[int, typer.Option(min=1)] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List names, their newest versions and where their aliases point."""
    from dataclasses import asdict

    from orchestrator import report

    found = workspace_here().store.names(prefix, after=after, limit=limit)
    if as_json:
        print_json([asdict(row) for row in found])
    else:
        out.print(report.names_table(found))


def versions(
    name: Annotated[str | None, typer.Argument(help="Only of this name.")] = None,
    client: Annotated[
        str | None, typer.Option(help="Only those made with an update of this client.")
    ] = None,
    before: Annotated[str | None, typer.Option(help="The last one of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List versions, newest first."""
    from orchestrator import report, views

    found = workspace_here().store.versions(name=name, client=client, before=before, limit=limit)
    if as_json:
        print_json([views.version_json(version) for version in found])
    else:
        out.print(report.versions_table(found))


@alias_app.command("log")
def alias_log(
    pointer: Annotated[str, typer.Argument(metavar="NAME@ALIAS")], as_json: JsonFlag = False
) -> None:
    """Show every move of an alias: who, when, from where to where, and why; newest first."""
    from orchestrator import deploying, report, views

    moves = deploying.alias_log(workspace_here(), pointer)
    if as_json:
        print_json([views.move_json(move) for move in moves])
    else:
        out.print(report.moves_table(moves))
