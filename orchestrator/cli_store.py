"""``weft fsck``, ``weft gc`` and ``weft store``: keep a store sound, back it up, bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from orchestrator.terminal import JsonFlag, err, out, print_json, workspace_here

_SHOWN = 20


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    mirror: Annotated[
        list[str], typer.Option("--mirror", help="Fetch blobs from here: a folder or a url.")
    ] = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Hash every blob, check every row and edge; exit 1 if something is wrong."""
    from orchestrator import upkeep, views

    workspace = workspace_here()
    with _bar("hashing blobs") as progress:
        found = upkeep.fsck(workspace, repair, mirror, progress)
    if as_json:
        print_json(views.checkup_json(found))
    else:
        for problem in found.store.problems:
            done = f"  [{problem.repaired}]" if problem.repaired else ""
            out.print(f"{problem.text}{done}", highlight=False, markup=False)
        out.print(views.checkup_line(found), highlight=False, markup=False)
    if not found.store.is_sound:
        raise typer.Exit(1)


def gc(
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Remove them, or only say which.")
    ] = False,
    grace_s: Annotated[
        float, typer.Option("--grace-s", min=0, help="Seconds from finding a blob to removing it.")
    ] = 86_400.0,
    as_json: JsonFlag = False,
) -> None:
    """Remove the blobs that nothing reaches: condemned by one pass, removed by a later one."""
    from orchestrator import upkeep, views

    found, drafts = upkeep.gc(workspace_here(), delete, grace_s)
    if as_json:
        print_json(views.collection_json(found, drafts, delete))
        return
    for title, blobs in (("remove", found.removed), ("condemned", found.waiting)):
        for blob in blobs[:_SHOWN]:
            line = f"{title:10s} {blob.digest[:12]}  {blob.size_bytes:>12,} bytes"
            out.print(line, highlight=False)
        if len(blobs) > _SHOWN:
            out.print(f"{title:10s} and {len(blobs) - _SHOWN} more", highlight=False)
    out.print(views.collection_line(found, drafts, delete), highlight=False)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; on anything else, nothing."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
