"""``weft run``, ``weft runs`` and ``weft coordinator``: start runs, drive them, steer them."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.terminal import (
    JsonFlag,
    LogFile,
    LogFormat,
    MetricsFile,
    MetricsPort,
    Set,
    err,
    limits,
    out,
    pairs,
    print_json,
    workspace_here,
)

Detach = Annotated[
    bool, typer.Option("--detach", help="Queue it for a coordinator and print its id.")
]
Priority = Annotated[int, typer.Option("--priority", help="A higher one is claimed first.")]
Label = Annotated[list[str], typer.Option("--label", help="What limits go by: key=value.")]

runs_app = typer.Typer(
    help="List runs, show one, read its log, pause, resume, cancel, extend, clone it.",
    invoke_without_command=True,
)


def run(  # noqa: PLR0913  (one option each)
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file.")] = None,
    overrides: Set = [],  # noqa: B006  (typer reads the default and never changes it)
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this run instead.")
    ] = None,
    accept_drift: Annotated[
        bool,
        typer.Option("--accept-drift", help="Resume with other libraries than it was begun with."),
    ] = False,
    detach: Detach = False,
    priority: Priority = 0,
    label: Label = [],  # noqa: B006
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Join this Ray cluster, HOST:PORT of its head."),
    ] = None,
    accept_unbounded: Annotated[
        bool, typer.Option("--accept-unbounded", help="Run without privacy on budgeted data.")
    ] = False,
    reason: Annotated[
        str, typer.Option("--reason", help="Why that is accepted; in the lineage for ever.")
    ] = "",
    log_format: LogFormat = None,
    log_file: LogFile = None,
    metrics_port: MetricsPort = None,
    metrics_file: MetricsFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Launch a federated run, queue one, or go on with one."""
    from orchestrator import service
    from orchestrator.config import BadConfig, load_config
    from orchestrator.observers.process import Watch
    from storage.ledger import Queueing

    if (config is None) == (resume is None):
        raise BadConfig("give a run's YAML file, or --resume RUN")
    if accept_drift and resume is None:
        raise BadConfig("--accept-drift is for a run that goes on: give --resume RUN with it")
    if accept_unbounded != bool(reason.strip()):
        raise BadConfig("--accept-unbounded and --reason WHY go together: the reason is for ever")
    if reason:
        overrides = [*overrides, f"accept_unbounded={json.dumps(reason)}"]
    if ray_address is not None:
        overrides = [*overrides, f"backend.address={json.dumps(ray_address)}"]
    if resume is not None and (overrides or detach or priority or label):
        raise BadConfig(
            "--set cannot change a run that goes on, nor --ray-address, --accept-unbounded, "
            "--detach, --priority, --label; "
            "weft runs resume RUN queues it, weft runs clone RUN --set … starts a changed one"
        )
    queueing = Queueing(priority, pairs(label, "--label"))
    workspace = workspace_here()
    watch = Watch(log_format, log_file, metrics_port, metrics_file)
    if resume is not None:
        with _shown(as_json, watch) as observe:
            version = service.resume(workspace, resume, observe, accept_drift=accept_drift)
        _print_version(workspace, version, as_json)
        return
    assert config is not None
    _start(workspace, load_config(config, overrides), queueing, detach, as_json, watch)


def coordinator(  # noqa: PLR0913  (one option each)
    limit: Annotated[
        list[str], typer.Option("--limit", help="At most so many at once: key=value:2.")
    ] = [],  # noqa: B006
    once: Annotated[bool, typer.Option("--once", help="One run at most.")] = False,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End when no run waits or is driven.")
    ] = False,
    lease_s: Annotated[
        float, typer.Option("--lease-s", min=1, help="Until a dead driver's run is another's.")
    ] = 60.0,
    max_claims: Annotated[
        int,
        typer.Option("--max-claims", min=1, help="A run that costs so many drivers a round fails."),
    ] = 5,
    log_format: LogFormat = None,
    log_file: LogFile = None,
    metrics_port: MetricsPort = None,
    metrics_file: MetricsFile = None,
) -> None:
    """Claim queued runs and drive them, one at a time; start as many as you like, anywhere."""
    from orchestrator import service
    from orchestrator.observers.base import Observers
    from orchestrator.observers.process import Watch
    from orchestrator.progress import RunProgress
    from orchestrator.streaming import Following

    workspace = workspace_here()
    stop, streams = threading.Event(), Following(workspace)

    process = Observers(*Watch(log_format, log_file, metrics_port, metrics_file).observers())

    @contextmanager
    def watch() -> Iterator[Any]:
        with RunProgress(out, live=log_format is None or log_file is not None) as progress:

            def seen(kind: str, data: Mapping[str, Any]) -> None:
                if kind == "run":
                    out.print(f"run {data['run']} of {data['name']}", highlight=False)
                progress(kind, data)
                process(kind, data)
                if kind == "completed":
                    out.print(f"{data['name']}  {data['version']}")

            yield seen

    with stopped_by_signals(stop), process:
        count = service.serve(
            workspace,
            service.Serving(
                limits(limit), once, until_idle, after=streams.after, idle=streams.idle
            ),
            service.Driving(lease_s=lease_s, stop=stop, max_claims=max_claims),
            watch,
        )
    out.print(f"drove {count} runs", style="dim")


@runs_app.callback()
def runs(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List runs, newest first."""
    if context.invoked_subcommand is None:
        runs_list(as_json=as_json)


@runs_app.command("list")
def runs_list(
    limit: Annotated[int, typer.Option(min=1)] = 50,
    before: Annotated[
        str | None, typer.Option("--before", help="Only older than this: the next page.")
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="queued, running, paused, completed, …")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List runs, newest first."""
    from orchestrator import report, views

    ledger = workspace_here().ledger
    last = None if before is None else ledger.run(before).id
    records = ledger.runs(limit, last, status)
    if as_json:
        print_json([views.run_json(r) for r in records])
        return
    out.print(report.runs_table(records))
    if len(records) == limit:
        out.print(f"older ones: --before {records[-1].id}", style="dim")


@runs_app.command("show")
def runs_show(ref: str, as_json: JsonFlag = False) -> None:
    """Show one run: by id, unique prefix, or name (its newest)."""
    from orchestrator import report, views, watching
    from orchestrator.quarantine import quarantined_in

    ledger = workspace_here().ledger
    record = ledger.run(ref)
    barred, losses = quarantined_in(ledger, record.id), watching.losses(ledger, record.id)
    if as_json:
        facts = {"plan": ledger.plan(record.id), "quarantined": barred, "train_loss": losses}
        print_json({**views.run_json(record), **facts})
        return
    out.print(report.runs_table([record]))
    if losses:
        last = ", ".join(f"{loss:.3f}" for loss in list(losses.values())[-5:])
        out.print(f"train_loss of the last rounds: {last}", highlight=False)
    if barred:
        out.print(f"quarantined: {', '.join(barred)}", style="yellow", markup=False)
    out.print_json(json.dumps(record.config))


@runs_app.command("release")
def runs_release(ref: str, client: str) -> None:
    """Forget a client's faults in a run: it may be asked again from the next round on."""
    from orchestrator.quarantine import release

    ledger = workspace_here().ledger
    release(ledger, ledger.run(ref).id, client)


@runs_app.command("log")
def runs_log(
    ref: str,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print a run's events in order."""
    from orchestrator import views, watching

    for event in watching.log(workspace_here(), ref, follow):
        if as_json:
            sys.stdout.write(json.dumps(views.event_json(event)) + "\n")
            sys.stdout.flush()
        else:
            facts = " ".join(f"{k}={v}" for k, v in event.data.items())
            out.print(
                f"{event.seq:5d} {event.at:%H:%M:%S} {event.kind} {facts}",
                markup=False,
                highlight=False,
            )


@runs_app.command("wait")
def runs_wait(
    refs: list[str],
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds at most.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Wait until runs have ended; exit code 1 if one of them failed or was cancelled."""
    from orchestrator import views, watching

    records = watching.wait(workspace_here(), refs, timeout)
    if as_json:
        print_json([views.run_json(r) for r in records])
    else:
        for r in records:
            what = r.version if r.status == "completed" else r.error or ""
            out.print(f"{r.id} {r.status} {what}", markup=False, highlight=False)
    if any(r.status != "completed" for r in records):
        raise typer.Exit(1)


@runs_app.command("pause")
def runs_pause(ref: str, as_json: JsonFlag = False) -> None:
    """Pause a run: at once while it waits, at its next event while it is driven."""
    from orchestrator import service

    _say(service.pause(workspace_here(), ref), as_json)


@runs_app.command("resume")
def runs_resume(ref: str, as_json: JsonFlag = False) -> None:
    """Put a paused or failed run back into the queue."""
    from orchestrator import service

    _say(service.requeue(workspace_here(), ref), as_json)


@runs_app.command("cancel")
def runs_cancel(ref: str, as_json: JsonFlag = False) -> None:
    """Cancel a run for good; what it has committed stays."""
    from orchestrator import service

    _say(service.cancel(workspace_here(), ref), as_json)


@runs_app.command("extend")
def runs_extend(
    ref: str,
    rounds: Annotated[str, typer.Option("--rounds", help="+10 more, or 40 in all.")],
    as_json: JsonFlag = False,
) -> None:
    """Give a run more rounds; a completed one goes on from its last version."""
    from orchestrator import service

    _say(service.extend(workspace_here(), ref, rounds), as_json)


@runs_app.command("clone")
def runs_clone(
    ref: str,
    overrides: Set = [],  # noqa: B006
    detach: Detach = False,
    priority: Annotated[
        int | None, typer.Option("--priority", help="By default the run's own.")
    ] = None,
    label: Label = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Start a new run with another's config and changes."""
    from orchestrator import service
    from storage.ledger import Queueing

    workspace = workspace_here()
    old = workspace.ledger.run(ref)
    queueing = Queueing(
        old.priority if priority is None else priority, pairs(label, "--label") or old.labels
    )
    _start(workspace, service.clone(workspace, old.id, overrides), queueing, detach, as_json)


def _start(
    workspace: Any, config: Any, queueing: Any, detach: bool, as_json: bool, watch: Any = None
) -> None:
    """Queue a run or drive it to its end, and print what came of it."""
    from orchestrator import service, views

    if not detach:
        with _shown(as_json, watch) as observe:
            version = service.launch(workspace, config, observe, queueing=queueing)
        _print_version(workspace, version, as_json)
        return
    run = service.submit(workspace, config, queueing)
    if as_json:
        print_json(views.run_json(workspace.ledger.run(run)))
        return
    out.print(run, highlight=False)
    err.print("queued; a weft coordinator drives it", style="dim")


@contextmanager
def _shown(as_json: bool, watch: Any) -> Iterator[Any]:
    """Yield what shows a run as it goes on, and tells who watches the process."""
    from orchestrator.observers.base import Observers
    from orchestrator.observers.process import Watch
    from orchestrator.progress import RunProgress

    watch = watch or Watch()
    torn = watch.log_format is not None and watch.log_file is None
    with (
        RunProgress(err if as_json else out, live=not torn) as progress,
        Observers(progress, *watch.observers()) as observe,
    ):
        yield observe


def _print_version(workspace: Any, version: str, as_json: bool) -> None:
    from orchestrator import views

    found = workspace.store.version(version)
    if as_json:
        print_json(views.version_json(found))
        return
    name = found.names[-1] if found.names else version[:12]
    out.print(f"{name}  {version}")
    out.print(f"next: weft lineage {name}", style="dim")


def _say(record: Any, as_json: bool) -> None:
    """Print where a run stands after a command."""
    from orchestrator import report, views

    if as_json:
        print_json(views.run_json(record))
    else:
        out.print(
            f"{record.id}: {report.standing(record)}, {record.round} of {record.rounds} rounds",
            highlight=False,
        )


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` at SIGTERM or Ctrl-C; a second Ctrl-C interrupts."""

    def heard(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, heard) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
