"""The command line: parses, calls the service, prints. Nothing else."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from clients.assignment import Task
from orchestrator.cli_clients import clients_app
from orchestrator.cli_deploy import followers_app, gate_app, promote, rollback
from orchestrator.cli_eval import evaluate
from orchestrator.cli_exchange import export, import_, keys_app, sign, verify
from orchestrator.cli_exposure import doctor, proxy
from orchestrator.cli_lineage import diff, lineage
from orchestrator.cli_merge import merge
from orchestrator.cli_node import node_app
from orchestrator.cli_privacy import privacy_app
from orchestrator.cli_refs import alias_app, names, versions, yank
from orchestrator.cli_replay import replay
from orchestrator.cli_runs import coordinator, run, runs_app
from orchestrator.cli_serve import serve
from orchestrator.cli_store import fsck, gc, store_app
from orchestrator.cli_streams import plot, stream_app
from orchestrator.cli_superlink import superlink_app
from orchestrator.cli_tables import sweep
from orchestrator.cli_vllm import deploy, deployments, gateway, undeploy
from orchestrator.terminal import (
    Fields,
    JsonFlag,
    Set,
    err,
    out,
    pairs,
    print_json,
    workspace_here,
)

_EXPECTED = (LookupError, ValueError, OSError, RuntimeError, ImportError)
_OURS = ("clients", "orchestrator", "storage", "strategies")

app = typer.Typer(
    name="weft",
    help="Federated and continual fine-tuning with low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.command()(run)
app.command()(coordinator)
app.command()(evaluate)
app.command("eval")(evaluate)
app.command()(sweep)
app.command()(plot)
app.command()(fsck)
app.command()(gc)
app.command()(lineage)
app.command()(diff)
app.command()(names)
app.command()(versions)
app.command()(merge)
app.command()(promote)
app.command()(rollback)
app.command()(yank)
app.add_typer(alias_app, name="alias")
app.add_typer(gate_app, name="gate")
app.add_typer(followers_app, name="followers")
app.add_typer(runs_app, name="runs")
app.add_typer(clients_app, name="clients")
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
app.add_typer(node_app, name="node")
app.add_typer(privacy_app, name="privacy")
app.command("import")(import_)
app.command()(export)
app.command()(verify)
app.command()(sign)
app.command()(deploy)
app.command()(undeploy)
app.command()(deployments)
app.command()(gateway)
app.command()(replay)
app.command()(serve)
app.command()(proxy)
app.command()(doctor)
app.add_typer(store_app, name="store")
app.add_typer(stream_app, name="stream")
app.add_typer(superlink_app, name="superlink")


def main() -> None:
    """Run the command line; an expected error is one line and exit code 2, a bug a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted", style="red", markup=False)
        sys.exit(130)
    except _EXPECTED as error:
        if not _is_expected(error):
            raise
        message = error.args[0] if isinstance(error, LookupError) and error.args else str(error)
        err.print(f"error: {message}", style="red", markup=False, highlight=False)
        sys.exit(2)


def _is_expected(error: BaseException) -> bool:
    """Whether an error is one of ours by name, or the system's about a file or a full disk."""
    if type(error).__module__.partition(".")[0] in _OURS:
        return True
    return isinstance(error, OSError) and (
        error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


@app.command()
def check(config: Path, overrides: Set = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Check a run's file; estimate memory, bytes and ε; start nothing."""
    from orchestrator import check as checking
    from orchestrator.config import load_config

    workspace = workspace_here()
    found = checking.check(
        load_config(config, overrides), workspace.store, workspace.ledger, workspace.sites
    )
    facts = found.to_json()
    if as_json:
        print_json(facts)
        return
    mib = 1 << 20
    out.print(
        f"{facts['name']}: {facts['rounds']} rounds, {facts['cohort']} of "
        f"{len(facts['clients'])} clients a round",
        highlight=False,
    )
    out.print(
        f"base model     {facts['base_parameters']:,} parameters, "
        f"{facts['base_bytes'] / mib:.1f} MiB, hash {facts['base_hash'][:12]}",
        highlight=False,
    )
    if facts["library"]:
        out.print(f"library        {', '.join(v[:12] for v in facts['library'])}", highlight=False)
    out.print(f"trained        {facts['trainable_parameters']:,} parameters", highlight=False)
    out.print(
        f"memory         about {facts['worker_bytes'] / mib:.0f} MiB a worker, besides "
        "the libraries",
        highlight=False,
    )
    out.print(
        f"network        about {facts['round_bytes'] / mib:.2f} MiB a round, "
        f"{facts['run_bytes'] / mib:.1f} MiB in all",
        highlight=False,
    )
    if not facts["epsilon"]:
        out.print("privacy        none: updates are not noised", highlight=False)
    for name, spent in found.epsilons.items():
        noise = facts["epsilon"][name]["noise_multiplier"]
        out.print(f"privacy        {name}: {spent}, noise multiplier {noise:g}", highlight=False)


# --- versions ---------------------------------------------------------------------------------


@app.command()
def show(ref: str, as_json: JsonFlag = False) -> None:
    """Show one version."""
    from orchestrator import provenance, report, views

    workspace = workspace_here()
    version = workspace.store.version(ref)
    if as_json:
        print_json(views.version_json(version))
    else:
        ancestry = provenance.lineage(workspace, version.id)
        out.print(report.version_table(version, ancestry.epsilons))


# --- look -------------------------------------------------------------------------------------


@app.command()
def plugins(
    kind: Annotated[str | None, typer.Argument(help="strategy, adapter, …")] = None,
    name: Annotated[str | None, typer.Argument()] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="What goes together, as Markdown, with the reasons.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List plug-ins, of one kind or all; with a name, its options."""
    from orchestrator import catalogue, report
    from orchestrator.config import find_plugin

    if matrix:
        _print_matrix(as_json)
        return
    rows = list(catalogue.plugin_table(kind))
    if name is not None:
        assert kind is not None
        wanted = find_plugin(kind, name).name
        rows = [row for row in rows if row["name"] == wanted]
    if as_json:
        print_json(rows)
    elif name is not None:
        out.print(report.options_table(rows[0]))
        out.print(rows[0]["summary"], highlight=False)
    else:
        out.print(report.plugins_table(rows))


def _print_matrix(as_json: bool) -> None:
    from dataclasses import asdict

    from orchestrator.matrix import markdown
    from orchestrator.matrix import matrix as planned

    cells = planned()
    if as_json:
        print_json([asdict(cell) for cell in cells])
    else:
        sys.stdout.write(markdown(cells))


@data_app.command("check")
def data_check(  # noqa: PLR0913  (one option each)
    uri: str,
    fields: Fields = "",
    labels: Annotated[str, typer.Option(help="The label set: a,b,c.")] = "",
    task: Annotated[Task, typer.Option(help="What the records are for.")] = "classification",
    model: Annotated[str | None, typer.Option(help="Count tokens with its tokenizer.")] = None,
    max_length: Annotated[int, typer.Option(min=1)] = 128,
    as_json: JsonFlag = False,
) -> None:
    """Print a data set's bad lines, label counts and truncation."""
    from dataclasses import asdict

    from clients.assignment import DataSpec
    from clients.inspection import inspect
    from orchestrator import report

    spec = DataSpec(uri, pairs(fields.split(",") if fields else [], "--fields"))
    names = tuple(labels.split(",")) if labels else ()
    found = inspect(spec, names, model, max_length, task)
    if as_json:
        print_json(asdict(found))
    else:
        out.print(report.data_report(found), highlight=False)
    if found.num_bad:
        raise typer.Exit(2)


@app.command()
def init(
    path: Annotated[Path, typer.Argument()] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
    task: Annotated[Task, typer.Option(help="What the run is for.")] = "classification",
) -> None:
    """Write a commented run.yaml to start from."""
    from orchestrator.template import write_template

    write_template(path, force, task)
    out.print(f"wrote {path}; next: weft check {path}", highlight=False)


@app.command()
def demo(
    dp: Annotated[bool, typer.Option("--dp/--no-dp", help="Train with DP-SGD.")] = True,
    strategy: Annotated[str, typer.Option(help="Any strategy.")] = "fedsvd",
    model: Annotated[str, typer.Option(help="Any encoder: Hub id or folder.")] = "builtin:minilm",
    home: Annotated[Path | None, typer.Option(help="Keep the store here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, for a first look.")] = False,
) -> None:
    """Train, stack, merge, trace and export on real text, in a few minutes."""
    from orchestrator.demo import run_demo

    run_demo(out, dp=dp, strategy=strategy, model=model, home=home, quick=quick)


if __name__ == "__main__":
    main()
