"""``weft sweep`` and ``weft runs compare``: many runs, and the table that comes of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli_runs import Label, Priority, runs_app, stopped_by_signals
from orchestrator.terminal import JsonFlag, err, out, pairs, print_json, workspace_here


def sweep(  # noqa: PLR0913  (one option each)
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file.")],
    run: Annotated[
        bool, typer.Option("--run", help="Drive the runs here, one after another.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and say what would be queued and spent.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only say how its runs stand; plan nothing.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Put failed and paused runs back into the queue.")
    ] = False,
    priority: Priority = 0,
    label: Label = [],  # noqa: B006  (typer reads the default and never changes it)
    as_json: JsonFlag = False,
) -> None:
    """Queue the runs of a grid of settings and seeds: those that are missing, and no others."""
    from orchestrator import sweeping
    from orchestrator.config import BadConfig
    from orchestrator.coordinator import Driving
    from orchestrator.sweep import load_sweep
    from storage.ledger import Queueing

    if sum((run or retry, dry_run, status)) > 1:
        raise BadConfig("give one of --run (and --retry), --dry-run, --status")
    name, points = load_sweep(file)
    workspace = workspace_here()
    if status:
        _print_sweep(sweeping.standing(workspace, name, points), as_json)
        return
    found = sweeping.forecast(workspace, name, points)
    if dry_run:
        _print_sweep(found, as_json)
        return
    if not as_json:
        _print_costs(found)
    added = sweeping.queue(workspace, found, Queueing(priority, pairs(label, "--label")), retry)
    now = sweeping.standing(workspace, name, points)
    if run:
        stop = threading.Event()
        with stopped_by_signals(stop), _Bar(now) as bar:
            sweeping.drive_all(workspace, now, Driving(stop=stop), bar.watch)
        now = sweeping.standing(workspace, name, points)
    _print_sweep(now, as_json)
    if not as_json:
        hint = f"next: weft runs compare --sweep {name}"
        if not run:
            hint = f"queued {added}; a weft coordinator drives them, and so does --run"
        err.print(hint, style="dim", highlight=False)


class _Bar:
    """A bar of a sweep's rounds, and the run that is being driven."""

    def __init__(self, found: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Left

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
        self._progress = Progress(*columns, console=err, transient=True)
        records = found.records.values()
        total, done = sum(r.rounds for r in records), sum(r.round for r in records)
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def watch(self, record: Any) -> Any:
        """Return what moves the bar with a run's events."""
        self._progress.update(self._task, description=record.name)

        def seen(kind: str, data: Mapping[str, Any]) -> None:
            if kind == "committed":
                self._progress.advance(self._task)

        return seen


def _print_sweep(found: Any, as_json: bool) -> None:
    from orchestrator import tables

    if as_json:
        print_json(found.to_json())
        return
    out.print(tables.sweep_table(found))
    counts = ", ".join(f"{count} {status}" for status, count in found.counts().items())
    out.print(f"{found.name}: {len(found.points)} runs: {counts}", highlight=False)
    _print_costs(found)


def _print_costs(found: Any) -> None:
    from orchestrator import tables

    for line in tables.cost_lines(found):
        out.print(line, markup=False, highlight=False)


@runs_app.command("compare")
def runs_compare(
    refs: Annotated[list[str] | None, typer.Argument(help="Ids, prefixes or names.")] = None,
    of_sweep: Annotated[
        str | None, typer.Option("--sweep", help="All runs of the sweep of this name.")
    ] = None,
    metric: Annotated[
        list[str], typer.Option("--metric", help="Only this metric; may be repeated.")
    ] = [],  # noqa: B006
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, unrounded.")] = False,
    as_latex: Annotated[
        bool, typer.Option("--latex", help="Print a LaTeX table, for booktabs.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare runs by what differs in their configs: mean and spread over seeds."""
    from orchestrator import comparing, tables
    from orchestrator.config import BadConfig

    if sum((as_csv, as_latex, as_json)) > 1:
        raise BadConfig("give one of --csv, --latex, --json")
    found = comparing.compare(workspace_here(), refs or [], of_sweep, metric)
    if as_json:
        print_json(found.to_json())
    elif as_csv or as_latex:
        sys.stdout.write(found.to_csv() if as_csv else found.to_latex())
        for note in found.notes if as_csv else ():
            err.print(note, style="dim", markup=False, highlight=False)
    else:
        out.print(tables.comparison_table(found))
        for note in found.notes:
            out.print(note, style="dim", markup=False, highlight=False)
