"""``weft lineage`` and ``weft diff``: what versions are made of, and in what they differ."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from orchestrator.terminal import JsonFlag, out, print_json, workspace_here


def lineage(  # noqa: PLR0913  (one option each)
    ref: Annotated[str | None, typer.Argument()] = None,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="What was made of it, instead.")
    ] = False,
    kind: Annotated[
        list[str], typer.Option("--kind", help="Follow only edges of this kind, such as merge.")
    ] = [],  # noqa: B006
    depth: Annotated[int | None, typer.Option(min=0, help="Most steps.")] = None,
    client: Annotated[str | None, typer.Option(help="Only what leads to this client.")] = None,
    run: Annotated[str | None, typer.Option(help="Only what leads to this run.")] = None,
    contains_client: Annotated[
        str | None,
        typer.Option("--contains-client", help="Instead of REF: what holds a client's updates?"),
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Show every round.")] = False,
    form: Annotated[
        Literal["tree", "mermaid", "dot"], typer.Option("--format", help="How to draw it.")
    ] = "tree",
    as_json: JsonFlag = False,
) -> None:
    """Print what a version is made of, down to client updates, or what was made of it."""
    from orchestrator import drawing, provenance, report, views

    workspace = workspace_here()
    if contains_client is not None:
        deployed = provenance.deployed_with(workspace, contains_client)
        if as_json:
            print_json(views.deployments_json(deployed))
        else:
            out.print(report.deployments_table(deployed))
        return
    if ref is None:
        message = "a lineage is of a version: give its REF, or --contains-client"
        raise provenance.BadSelection(message)
    ask = provenance.descendants if descendants else provenance.lineage
    found = ask(workspace, ref, provenance.Selection(tuple(kind), depth, client, run))
    if as_json:
        print_json(views.lineage_json(found))
    elif form == "tree":
        out.print(drawing.lineage_tree(found, whole))
    else:
        draw = drawing.mermaid if form == "mermaid" else drawing.graphviz
        out.print(draw(found), markup=False, highlight=False)


def diff(first: str, second: str, as_json: JsonFlag = False) -> None:
    """Print what the second version changed against the first."""
    from orchestrator import diff_report, differences

    found = differences.diff(workspace_here(), first, second)
    if as_json:
        print_json(diff_report.as_json(found))
        return
    for part in diff_report.tables(found):
        out.print(part, highlight=False)
