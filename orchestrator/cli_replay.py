"""``weft replay``: what was made can be made again."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.terminal import JsonFlag, err, out, print_json, workspace_here


def replay(
    ref: str,
    verify: Annotated[
        bool, typer.Option("--verify", help="Aggregate REF again from its stored updates.")
    ] = False,
    from_data: Annotated[
        bool, typer.Option("--from-data", help="Train the run REF again, from its clients' data.")
    ] = False,
    whole: Annotated[bool, typer.Option("--all", help="Every version behind REF too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a version again, and say whether it is the same."""
    from orchestrator.config import BadConfig

    if verify == from_data or (whole and from_data):
        raise BadConfig("give --verify for a version (and --all), or --from-data for a run")
    (_again if from_data else _verified)(ref, whole, as_json)


def _verified(ref: str, whole: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from orchestrator import service

    found = service.replay(workspace_here(), ref, whole)
    if as_json:
        print_json([asdict(one) for one in found])
    for one in found:
        line = f"{one.version[:12]}  round {one.round}  {one.outcome}  {one.why}".rstrip()
        if not as_json:
            out.print(line, highlight=False, markup=False)
    if any(one.outcome != "same" for one in found):
        err.print(f"error: not every version of {ref} was reached again", style="red", markup=False)
        raise typer.Exit(2)


def _again(ref: str, whole: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from orchestrator import service

    found = service.retrain(workspace_here(), ref)
    if as_json:
        print_json(asdict(found))
    else:
        reached = f"{found.updates} updates and {found.versions} versions are the same"
        out.print(reached, highlight=False)
    if found.differs:
        err.print(f"error: it differs first at {found.differs}", style="red", markup=False)
        raise typer.Exit(2)
