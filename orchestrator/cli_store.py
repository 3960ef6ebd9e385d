"""``weft fsck``, ``weft gc`` and ``weft store``: keep a store sound, back it up, bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal import JsonFlag, err, out, print_json, workspace_here

if TYPE_CHECKING:
    from orchestrator.upkeep import HomeCheckup

store_app = typer.Typer(
    help="Look at a store, back it up, bring it back, upgrade it.", no_args_is_help=True
)
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
        _print_checkup(found)
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


@store_app.command("show")
def store_show(as_json: JsonFlag = False) -> None:
    """Show where the store lies, how much of it there is, and how full its cache is."""
    from dataclasses import asdict

    from orchestrator import upkeep

    found = upkeep.standing(workspace_here())
    if as_json:
        print_json(asdict(found))
        return
    counts = f"{found.versions} versions, {found.names} names, {found.runs} runs"
    cache = "none: the blobs are here, or WEFT_BLOB_CACHE=0"
    if found.cache is not None:
        used, limit = found.cache_bytes / 2**20, found.cache_limit_bytes / 2**20
        cache = f"{found.cache}, {used:.1f} of {limit:.1f} MiB"
    for title, text in (
        ("database", f"{found.database} (schema {found.schema})"),
        ("rows", f"{counts}, {found.updates} client updates kept"),
        ("blobs", found.blobs),
        ("cache", cache),
    ):
        out.print(f"{title:10s} {text}", highlight=False, markup=False, soft_wrap=True)


@store_app.command("backup")
def store_backup(folder: Path, as_json: JsonFlag = False) -> None:
    """Copy rows and blobs into a folder; again into the same one, only what is new."""
    from dataclasses import asdict

    from orchestrator import upkeep

    with _bar("copying blobs") as progress:
        found = upkeep.back_up(workspace_here(), folder, progress)
    if as_json:
        print_json(asdict(found))
    else:
        rows = sum(found.counts.values())
        out.print(f"{folder}: {rows} rows, {found.num_blobs} blobs", highlight=False, markup=False)
        for digest in found.missing:
            out.print(f"missing or corrupt, and not in the backup: {digest}", highlight=False)
    if found.missing:
        raise typer.Exit(1)


@store_app.command("restore")
def store_restore(
    folder: Path,
    replace: Annotated[
        bool, typer.Option("--replace", help="Lose names, aliases, runs that the backup lacks.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bring a backup back; no version and no privacy spend of this store is lost."""
    from orchestrator import upkeep, views

    with _bar("copying blobs") as progress:
        found, cancelled, checkup = upkeep.restore(workspace_here(), folder, replace, progress)
    if as_json:
        print_json(views.restored_json(found, cancelled, checkup))
    else:
        for run in found.paused:
            what = "cancelled: its clients' keys are not here" if run in cancelled else "paused"
            out.print(f"run {run} was going on and is {what}", highlight=False, markup=False)
        out.print(
            f"restored {found.backup.counts['versions']} versions of {found.backup.created_at}; "
            f"{found.num_spends} privacy spends count",
            highlight=False,
        )
        _print_checkup(checkup)
    if not checkup.store.is_sound:
        raise typer.Exit(1)


@store_app.command("upgrade")
def store_upgrade(as_json: JsonFlag = False) -> None:
    """Bring the store of an older weft up to date: back up, migrate, check."""
    from orchestrator import upkeep, views

    before, saved, checkup = upkeep.upgrade()
    if as_json:
        backup = None if saved is None else str(saved)
        print_json({"from": before, "backup": backup, "check": views.checkup_json(checkup)})
    else:
        done = "is up to date" if saved is None else f"upgraded from {before}; backup in {saved}"
        out.print(f"the store {done}", highlight=False, markup=False)
        _print_checkup(checkup)
    if not checkup.store.is_sound:
        raise typer.Exit(1)


def _print_checkup(found: HomeCheckup) -> None:
    from orchestrator import views

    for problem in found.store.problems:
        done = f"  [{problem.repaired}]" if problem.repaired else ""
        out.print(f"{problem.text}{done}", highlight=False, markup=False)
    out.print(views.checkup_line(found), highlight=False, markup=False)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; on anything else, nothing."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
