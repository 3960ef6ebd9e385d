"""``weft merge``: several versions as one, as it would be, or apart in one basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.terminal import (
    JsonFlag,
    err,
    numbers,
    out,
    pairs,
    print_json,
    workspace_here,
    yaml_value,
)

if TYPE_CHECKING:
    from orchestrator.merge_draft import Draft
    from orchestrator.merge_file import MergeFile
    from orchestrator.merge_parts import Allow
    from orchestrator.previewing import Preview
    from orchestrator.workspace import Workspace
    from storage.lineage import Version


def merge(  # noqa: PLR0913  (one option each)
    refs: Annotated[list[str] | None, typer.Argument(help="At least two versions.")] = None,
    into: Annotated[str, typer.Option("--into", help="The name that the result gets.")] = "",
    method: Annotated[str, typer.Option("--method", "-m")] = "cat",
    weights: Annotated[str, typer.Option(help="One per version: 1,0.5; default 1 each.")] = "",
    option: Annotated[list[str], typer.Option("--option", help="Of the method: key=value.")] = [],  # noqa: B006
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A file of stages, in place of all else.")
    ] = None,
    union: Annotated[
        bool, typer.Option("--union", help="Merge versions that change different layers.")
    ] = False,
    convert: Annotated[
        bool, typer.Option("--convert", help="Merge what is no LoRA as the nearest LoRA.")
    ] = False,
    search: Annotated[
        str, typer.Option("--search", metavar="DATA", help="Look for the best weights on these.")
    ] = "",
    trials: Annotated[int, typer.Option(min=3, help="Merges that a search scores.")] = 30,
    public: Annotated[
        bool, typer.Option("--public", help="Everyone may see the data of --search.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what it would be; commit nothing.")
    ] = False,
    apart: Annotated[
        bool, typer.Option("--apart", help="Of eigenlorax: keep each version, in one basis.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge versions into a new one."""
    from clients.assignment import PluginChoice
    from orchestrator import service
    from orchestrator.merge_draft import draft
    from orchestrator.merge_file import read_merge, searched
    from orchestrator.staged_merging import merge_in_stages

    if recipe is not None and (refs or into or search):
        raise typer.BadParameter("--recipe says what is merged into what; give nothing else")
    if recipe is None and not into:
        raise typer.BadParameter("--into NAME is missing: the name that the result gets")
    workspace = workspace_here()
    options = {k: yaml_value(v, "--option") for k, v in pairs(option, "--option").items()}
    what, allow = PluginChoice(method, options), service.Allow(union, convert)
    if apart:
        _refuse_beside_apart(method, bool(recipe or search or weights or preview))
        _show_basis(workspace, refs or [], options, into, allow, as_json)
        return
    chosen = numbers(weights) if weights else None
    file = None if recipe is None else read_merge(recipe)
    if search:
        looked = {"data": search, "public": public, "trials": trials}
        named = {"name": method, **options}
        allowed = {"union": union, "convert": convert}
        file = searched(refs or [], chosen, into, method=named, search=looked, **allowed)
    if preview and file is not None:
        _show_stages(workspace, file, as_json)
        return
    if preview:
        _show_preview(workspace, draft(workspace, refs or [], what, chosen, allow), into, as_json)
        return
    if file is not None:
        version = merge_in_stages(workspace, file)[-1].version
    else:
        version = service.merge(workspace, refs or [], what, into, chosen, allow)
    _show_merged(workspace.store.version(version), as_json)


def _show_merged(found: Version, as_json: bool) -> None:
    from orchestrator import views

    if as_json:
        print_json(views.version_json(found))
        return
    out.print(f"{found.names[-1]}  {found.id}", highlight=False)
    for what_is, share in sorted(found.metrics.items()):
        if "/" not in what_is or what_is.startswith("converted"):
            out.print(f"{what_is:<24}{share:.4f}", highlight=False)


def _refuse_beside_apart(method: str, more: bool) -> None:
    if method != "eigenlorax" or more:
        raise typer.BadParameter(
            "--apart keeps versions in one basis, without weights; give it with "
            "--method eigenlorax, --option, --union and --convert alone"
        )


def _show_preview(workspace: Workspace, made: Draft, into: str, as_json: bool) -> None:
    """Print what a merge would be: conflicts, energy, and scores on the suite of ``into``."""
    from orchestrator.previewing import preview

    found = preview(workspace, made, into)
    if as_json:
        print_json(found.to_json())
        return
    _print_preview(found, into)
    out.print("nothing was committed", highlight=False)


def _show_basis(
    workspace: Workspace,
    refs: Sequence[str],
    options: Mapping[str, Any],
    into: str,
    allow: Allow,
    as_json: bool,
) -> None:
    """Write versions in one basis, and print what each is called and what that saves."""
    from orchestrator.one_basis import in_one_basis

    found = in_one_basis(workspace, refs, options, into, allow)
    if as_json:
        print_json(found.to_json())
        return
    for one in found.cores:
        line = f"{one.name}  {one.version}  {one.energy:.1%} of {one.of[:12]}, {one.num_bytes} B"
        out.print(line, highlight=False, markup=False)
    out.print(
        f"{found.name}  {found.basis}  {found.num_bytes} B; "
        f"all of it {found.bytes_after} B, and {found.bytes_before} B before",
        highlight=False,
        markup=False,
    )


def _show_stages(workspace: Workspace, file: MergeFile, as_json: bool) -> None:
    """Print what each stage of a merge would be, as :func:`_show_preview` does of one."""
    from orchestrator.gate_report import stage_line
    from orchestrator.previewing import preview_in_stages

    found = preview_in_stages(workspace, file)
    if as_json:
        print_json([{"stage": stage, **one.to_json()} for stage, one in found.items()])
        return
    for stage in file.stages:
        out.print(stage_line(stage, found[stage.name]), highlight=False, markup=False)
        _print_preview(found[stage.name], file.into)
    out.print("nothing was committed", highlight=False)


def _print_preview(found: Preview, into: str) -> None:
    from orchestrator.gate_report import layers_table, scores_table

    out.print(layers_table(found))
    if found.scores:
        out.print(scores_table(found))
        return
    err.print(
        f"{into} has no evaluation suite; give it one with: weft gate set {into} FILE",
        highlight=False,
        markup=False,
    )
