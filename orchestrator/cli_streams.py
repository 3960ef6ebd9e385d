"""``weft stream``: tasks that arrive one after the other, and what was kept of each."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli_runs import Detach, Label, Priority, stopped_by_signals
from orchestrator.terminal import JsonFlag, err, out, pairs, print_json, workspace_here

stream_app = typer.Typer(
    help="Train task after task, extend and fork it, and see what was forgotten.",
    no_args_is_help=True,
)
File = Annotated[Path, typer.Argument(help="The stream's YAML file.")]


@stream_app.command("init")
def stream_init(
    path: Annotated[Path, typer.Argument()] = Path("stream.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a commented stream.yaml to start from."""
    from orchestrator.stream_template import write_stream_template

    write_stream_template(path, force)
    out.print(f"wrote {path}; next: weft stream plan {path}", highlight=False)


@stream_app.command("plan")
def stream_plan(file: File, as_json: JsonFlag = False) -> None:
    """Show what each task and the whole stream would spend of whose privacy; train nothing."""
    from orchestrator.stream import load_stream
    from orchestrator.stream_forecast import forecast_stream
    from orchestrator.stream_report import forecast_table, task_line

    found = forecast_stream(workspace_here(), load_stream(file))
    if as_json:
        print_json(found.to_json())
        return
    for task in found.tasks:
        out.print(task_line(task), highlight=False, markup=False)
    out.print(forecast_table(found))


@stream_app.command("run")
def stream_run(
    file: File,
    detach: Detach = False,
    priority: Priority = 0,
    label: Label = [],  # noqa: B006  (typer reads the default and never changes it)
    as_json: JsonFlag = False,
) -> None:
    """Train the tasks that are not done yet, each from the one before; go on if interrupted."""
    from orchestrator.stream import load_stream
    from storage.ledger import Queueing

    stream = load_stream(file)
    _go_on(workspace_here(), stream, Queueing(priority, pairs(label, "--label")), detach, as_json)


@stream_app.command("extend")
def stream_extend(
    stream: Annotated[str, typer.Argument(help="The stream's file, or with --task its name.")],
    task: Annotated[
        Path | None, typer.Option("--task", help="A YAML file with the task that arrived.")
    ] = None,
    detach: Detach = False,
    as_json: JsonFlag = False,
) -> None:
    """Append tasks to a stream that there is, and train them."""
    from orchestrator.config import BadConfig, read_document
    from orchestrator.stream import load_stream, parse_stream
    from orchestrator.streaming import recorded
    from storage.ledger import Queueing

    workspace = workspace_here()
    if task is None:
        wanted = load_stream(stream)
        old = [one.name for one in recorded(workspace, wanted.name).tasks]
    else:
        known = recorded(workspace, stream)
        old = [one.name for one in known.tasks]
        tasks = [*known.document["tasks"], read_document(task, "docs/continual.md shows one")]
        wanted = parse_stream({**known.document, "tasks": tasks}, str(task))
    names = [one.name for one in wanted.tasks]
    if names[: len(old)] != old:
        raise BadConfig(
            f"stream {wanted.name!r} has the tasks {', '.join(old)}, and the file begins with "
            f"others ({', '.join(names)}); tasks are appended, and other ones need a fork"
        )
    _go_on(workspace, wanted, Queueing(), detach, as_json)


@stream_app.command("fork")
def stream_fork(
    origin: Annotated[str, typer.Argument(help="The stream to go on from, by name.")],
    file: File,
    at: Annotated[str, typer.Option("--at", help="The last task that both have in common.")],
    name: Annotated[str | None, typer.Option("--name", help="By default the file's.")] = None,
    detach: Detach = False,
    as_json: JsonFlag = False,
) -> None:
    """Go on from a task of another stream with the tasks of a file."""
    from orchestrator.stream_file import read_stream
    from orchestrator.stream_forks import forked
    from storage.ledger import Queueing

    workspace = workspace_here()
    document = read_stream(file) | ({"name": name} if name else {})
    _go_on(workspace, forked(workspace, origin, document, at), Queueing(), detach, as_json)


@stream_app.command("list")
def stream_list(as_json: JsonFlag = False) -> None:
    """List streams."""
    from orchestrator import stream_report, streaming

    workspace = workspace_here()
    rows = [stream_report.line(workspace, name) for name in streaming.streams(workspace.ledger)]
    if as_json:
        print_json(rows)
    else:
        out.print(stream_report.streams_table(rows))


@stream_app.command("show")
def stream_show(
    name: str,
    ceiling: Annotated[
        str | None, typer.Option("--ceiling", help="A stream that trained all tasks at once.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a stream: its tasks, and the matrix of what each version knows of each task."""
    from orchestrator import stream_report

    workspace = workspace_here()
    found = stream_report.report(workspace, name, ceiling)
    if as_json:
        print_json(found.to_json())
    else:
        stream_report.show(found, out)


@stream_app.command("check")
def stream_check(  # noqa: PLR0913  (one option each)
    name: str,
    tolerance: Annotated[
        float, typer.Option("--tau", help="The largest fall that is allowed.")
    ] = 0.02,
    ref: Annotated[
        str | None, typer.Option("--version", help="By default the stream's newest.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="By default the version that learned each task."),
    ] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the intervals.")] = 0.95,
    told_task: Annotated[
        bool, typer.Option("--told-task", help="Where the model is told the task.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say by how much past tasks fell; exit code 0 if surely by no more than tau, else 1."""
    from orchestrator import stream_report
    from orchestrator.stream_gate import Gate, check

    gate = Gate(tolerance, confidence, told_task, against)
    found = check(workspace_here(), name, gate, ref)
    if as_json:
        print_json(found.to_json())
    else:
        out.print(stream_report.falls_table(found))
        out.print(stream_report.verdict_line(found), highlight=False)
    if found.verdict != "holds":
        raise typer.Exit(1)


def plot(
    stream: Annotated[str, typer.Argument(help="The stream's name.")],
    to: Annotated[Path, typer.Option("--to", help="An .svg or .png.")],
) -> None:
    """Draw a stream: what each version knows of each task."""
    from orchestrator import plotting, stream_report

    plotting.plot(stream_report.report(workspace_here(), stream), to)
    out.print(f"wrote {to}", highlight=False)


def _go_on(workspace: Any, stream: Any, queueing: Any, detach: bool, as_json: bool) -> None:
    """Drive a stream here, or queue its next task, and print how it stands."""
    from orchestrator import stream_report, streaming
    from orchestrator.coordinator import Driving, Stopped
    from orchestrator.progress import RunProgress

    if detach:
        streaming.keep(workspace, stream)
        waits = replace(queueing, facts=streaming.DETACHED)
        record = streaming.advance(workspace, stream, waits, retry=True)
        if record is not None and not as_json:
            out.print(record.id, highlight=False)
            err.print("queued; a weft coordinator drives it, and the tasks after it", style="dim")
            return
    else:
        stop = threading.Event()
        progress = RunProgress(err if as_json else out, live=True)
        with stopped_by_signals(stop), progress:
            try:
                streaming.run_stream(
                    workspace, stream, Driving(stop=stop), lambda run: progress, queueing
                )
            except Stopped:
                err.print("stopped; go on with the same command", style="dim")
                raise typer.Exit(130) from None
    found = stream_report.report(workspace, stream.name)
    if as_json:
        print_json(found.to_json())
    else:
        stream_report.show(found, out)
