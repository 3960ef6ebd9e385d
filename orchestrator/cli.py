"""The command line: parses, calls the service, prints. Nothing else."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
runs_app = typer.Typer(help="List runs, show one, read its log.", invoke_without_command=True)
clients_app = typer.Typer(help="Register clients and look at them.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(clients_app, name="clients")
app.add_typer(data_app, name="data")

_WIDTH = None if sys.stdout.isatty() else 160  # a pipe has no width of its own

out = Console(soft_wrap=True, width=_WIDTH)
err = Console(stderr=True, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[list[str], typer.Option("--set", help="Override: path.to.key=value.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Where the base model is, if it moved.")
]
Fields = Annotated[
    str, typer.Option("--fields", help="Column names of your own: text=note,label=dx.")
]


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
    """Whether an error is one of ours by name, or the system's about a file."""
    own = type(error).__module__.partition(".")[0] in _OURS
    return own or (isinstance(error, OSError) and error.filename is not None)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _workspace() -> Any:
    from orchestrator.service import open_workspace

    return open_workspace()


# --- runs -------------------------------------------------------------------------------------


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file.")] = None,
    overrides: Set = [],  # noqa: B006  (typer reads the default and never changes it)
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this run instead.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Launch a federated run, or go on with one."""
    from orchestrator import service
    from orchestrator.config import BadConfig, load_config
    from orchestrator.progress import RunProgress
    from orchestrator.spending import spent_by_run

    if (config is None) == (resume is None):
        raise BadConfig("give a run's YAML file, or --resume RUN")
    if resume is not None and overrides:
        raise BadConfig("--set cannot change a run that goes on; launch a new one")
    workspace = _workspace()
    console = err if as_json else out
    with RunProgress(console, lambda plan: spent_by_run(plan, workspace.ledger)) as progress:
        if resume is not None:
            version = service.resume(workspace, resume, progress)
        else:
            assert config is not None
            version = service.launch(workspace, load_config(config, overrides), progress)
    found = workspace.store.version(version)
    if as_json:
        _print_json(service.version_json(found))
        return
    name = found.names[-1] if found.names else version[:12]
    out.print(f"{name}  {version}")
    out.print(f"next: weft lineage {name}", style="dim")


@app.command()
def check(config: Path, overrides: Set = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Check a run's file; estimate memory, bytes and ε; start nothing."""
    from orchestrator import check as checking
    from orchestrator.config import load_config

    workspace = _workspace()
    found = checking.check(load_config(config, overrides), workspace.store, workspace.ledger)
    facts = found.to_json()
    if as_json:
        _print_json(facts)
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
    out.print(f"trained        {facts['trainable_parameters']:,} parameters", highlight=False)
    out.print(
        f"memory         about {facts['worker_bytes'] / mib:.0f} MiB a worker, besides "
        "the libraries",
        highlight=False,
    )
    out.print(
        f"network        at most {facts['round_bytes'] / mib:.2f} MiB a round, "
        f"{facts['run_bytes'] / mib:.1f} MiB in all",
        highlight=False,
    )
    if not facts["epsilon"]:
        out.print("privacy        none: updates are not noised", highlight=False)
    for name, spent in found.epsilons.items():
        noise = facts["epsilon"][name]["noise_multiplier"]
        out.print(f"privacy        {name}: {spent}, noise multiplier {noise:g}", highlight=False)


@runs_app.callback()
def runs(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List runs, newest first."""
    if context.invoked_subcommand is None:
        runs_list(as_json=as_json)


@runs_app.command("list")
def runs_list(limit: Annotated[int, typer.Option(min=1)] = 50, as_json: JsonFlag = False) -> None:
    """List runs, newest first."""
    from orchestrator import report, service

    records = _workspace().ledger.runs(limit=limit)
    if as_json:
        _print_json([service.run_json(r) for r in records])
    else:
        out.print(report.runs_table(records))


@runs_app.command("show")
def runs_show(ref: str, as_json: JsonFlag = False) -> None:
    """Show one run: by id, unique prefix, or name (its newest)."""
    from orchestrator import report, service

    record = _workspace().ledger.run(ref)
    if as_json:
        _print_json(service.run_json(record))
        return
    out.print(report.runs_table([record]))
    out.print_json(json.dumps(record.config))


@runs_app.command("log")
def runs_log(ref: str, as_json: JsonFlag = False) -> None:
    """Print a run's events in order."""
    ledger = _workspace().ledger
    for event in ledger.events(ledger.run(ref).id):
        if as_json:
            row = {"seq": event.seq, "at": event.at.isoformat(), "kind": event.kind}
            sys.stdout.write(json.dumps({**row, "data": event.data}) + "\n")
        else:
            facts = " ".join(f"{k}={v}" for k, v in event.data.items())
            out.print(
                f"{event.seq:5d} {event.at:%H:%M:%S} {event.kind} {facts}",
                markup=False,
                highlight=False,
            )


# --- clients ----------------------------------------------------------------------------------


@clients_app.command("add")
def clients_add(  # noqa: PLR0913  (one option each)
    name: str,
    data: Annotated[str, typer.Option("--data", help="Data set: jsonl:/path, csv:, hf:, …")],
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget, for good.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    fields: Fields = "",
    examples: Annotated[int | None, typer.Option(help="Declared size.", min=1)] = None,
    population: Annotated[str | None, typer.Option(help="Whose data it is.")] = None,
    public: Annotated[bool, typer.Option("--public", help="The data are public.")] = False,
    check: Annotated[bool, typer.Option(help="Look at the data set now.")] = True,
) -> None:
    """Register a client: a data set that takes part."""
    from orchestrator import service
    from storage.ledger import ClientRecord

    record = ClientRecord(
        name=name,
        data=_absolute(data),
        population=population or name,
        fields=_pairs(fields.split(",") if fields else [], "--fields"),
        num_examples=examples,
        epsilon=epsilon,
        delta=delta,
        labels=_pairs(label, "--label"),
        public=public,
    )
    made = service.register_client(_workspace(), record, check)
    budget = f"ε {made.epsilon:g} (δ {made.delta:g})" if made.epsilon is not None else "none"
    out.print(
        f"registered {made.name}: {made.num_examples} examples, budget {budget}",
        highlight=False,
        markup=False,
    )


@clients_app.command("list")
def clients_list(
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """List registered clients, all or those with these labels."""
    from orchestrator import report

    records = _workspace().ledger.clients(_pairs(label, "--label"))
    if as_json:
        _print_json([_client_json(r) for r in records])
    else:
        out.print(report.clients_table(records))


@clients_app.command("show")
def clients_show(name: str, as_json: JsonFlag = False) -> None:
    """Show a client and what its population has spent."""
    from orchestrator import report, service

    workspace = _workspace()
    record = workspace.ledger.client(name)
    spent = service.spent_by_population(workspace, record.population)
    if as_json:
        _print_json({**_client_json(record), "spent": spent})
        return
    out.print(report.clients_table([record]))
    out.print(f"spent: {spent['text']}", highlight=False)


@clients_app.command("budget")
def clients_budget(
    name: str,
    epsilon: Annotated[float | None, typer.Option(help="ε in all; leave out for none.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
) -> None:
    """Change the privacy budget of a client's population; what was spent stays spent."""
    ledger = _workspace().ledger
    population = ledger.client(name).population
    ledger.set_budget(population, epsilon, delta)
    budget = "none" if epsilon is None else f"ε {epsilon:g} (δ {delta:g})"
    out.print(f"{population}: budget {budget}", highlight=False, markup=False)


@clients_app.command("remove")
def clients_remove(name: str) -> None:
    """Forget a client; what its population has spent stays for ever."""
    _workspace().ledger.remove_client(name)
    out.print(f"removed {name}", highlight=False)


def _client_json(record: Any) -> dict[str, Any]:
    from dataclasses import asdict

    document = asdict(record)
    return {**document, "created_at": record.created_at.isoformat()}


# --- versions ---------------------------------------------------------------------------------


@app.command()
def lineage(
    ref: str,
    whole: Annotated[bool, typer.Option("--all", help="Show every round.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print what a version is made of, down to client updates."""
    from orchestrator import report, service

    found = service.lineage(_workspace(), ref)
    if as_json:
        _print_json(service.lineage_json(found))
    else:
        out.print(report.lineage_tree(found, whole))


@app.command()
def show(ref: str, as_json: JsonFlag = False) -> None:
    """Show one version."""
    from orchestrator import report, service

    workspace = _workspace()
    version = workspace.store.version(ref)
    if as_json:
        _print_json(service.version_json(version))
    else:
        ancestry = service.lineage(workspace, version.id)
        out.print(report.version_table(version, ancestry.epsilons))


@app.command()
def merge(
    refs: list[str],
    into: Annotated[str, typer.Option("--into", help="The name that the result gets.")],
    method: Annotated[str, typer.Option("--method", "-m")] = "cat",
    weights: Annotated[str, typer.Option(help="One per version: 1,0.5; default 1 each.")] = "",
    option: Annotated[list[str], typer.Option("--option", help="Of the method: key=value.")] = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Merge versions into a new one."""
    from clients.assignment import PluginChoice
    from orchestrator import service

    options = {k: _value(v, "--option") for k, v in _pairs(option, "--option").items()}
    workspace = _workspace()
    chosen = _numbers(weights) if weights else None
    version = service.merge(workspace, refs, PluginChoice(method, options), into, chosen)
    found = workspace.store.version(version)
    if as_json:
        _print_json(service.version_json(found))
    else:
        out.print(f"{found.names[-1]}  {version}")


@app.command()
def promote(
    ref: str,
    to: Annotated[str, typer.Option("--to", help="The alias, such as production.")],
    name: Annotated[str | None, typer.Option(help="The name the alias belongs to.")] = None,
    why: Annotated[str, typer.Option(help="For the alias's history.")] = "",
) -> None:
    """Point NAME@ALIAS at a version."""
    from orchestrator import service

    workspace = _workspace()
    owner = name or service.name_of(workspace, ref)
    service.promote(workspace, owner, to, ref, why)
    out.print(f"{owner}@{to}  {workspace.store.resolve(ref)}")


@app.command()
def export(ref: str, folder: Path, model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """Write a version as a PEFT folder."""
    from orchestrator import service

    files = service.export(_workspace(), ref, folder, model)
    if as_json:
        _print_json([str(f) for f in files])
    else:
        for file in files:
            out.print(str(file), highlight=False)


@app.command(name="eval")
def evaluate(
    ref: str,
    dataset: str,
    labels: Annotated[str, typer.Option(help="Only examples with these labels: a,b.")] = "",
    fields: Fields = "",
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a version on a data set."""
    from dataclasses import asdict

    from clients.assignment import DataSpec
    from orchestrator import service

    spec = DataSpec(
        dataset,
        _pairs(fields.split(",") if fields else [], "--fields"),
        labels=tuple(labels.split(",")) if labels else (),
    )
    found = service.evaluate(_workspace(), ref, spec, model)
    if as_json:
        _print_json(asdict(found))
        return
    for key, value in found.metrics.items():
        out.print(f"{key:16s} {value:.4f}", highlight=False)
    for key, value in found.label_accuracy.items():
        out.print(f"  {key:14s} {value:.4f}", style="dim", highlight=False)
    out.print(f"{found.num_examples} examples", style="dim", highlight=False)


# --- look -------------------------------------------------------------------------------------


@app.command()
def plugins(
    kind: Annotated[str | None, typer.Argument(help="strategy, adapter, …")] = None,
    name: Annotated[str | None, typer.Argument()] = None,
    as_json: JsonFlag = False,
) -> None:
    """List plug-ins, of one kind or all; with a name, its options."""
    from orchestrator import report, service
    from orchestrator.config import find_plugin

    rows = list(service.plugin_table(kind))
    if name is not None:
        assert kind is not None
        wanted = find_plugin(kind, name).name
        rows = [row for row in rows if row["name"] == wanted]
    if as_json:
        _print_json(rows)
    elif name is not None:
        out.print(report.options_table(rows[0]))
        out.print(rows[0]["summary"], highlight=False)
    else:
        out.print(report.plugins_table(rows))


@data_app.command("check")
def data_check(
    uri: str,
    fields: Fields = "",
    labels: Annotated[str, typer.Option(help="The label set: a,b,c.")] = "",
    model: Annotated[str | None, typer.Option(help="Count tokens with its tokenizer.")] = None,
    max_length: Annotated[int, typer.Option(min=1)] = 128,
    as_json: JsonFlag = False,
) -> None:
    """Print a data set's bad lines, label counts and truncation."""
    from dataclasses import asdict

    from clients.assignment import DataSpec
    from orchestrator import report, service

    spec = DataSpec(uri, _pairs(fields.split(",") if fields else [], "--fields"))
    names = tuple(labels.split(",")) if labels else ()
    found = service.check_data(spec, names, model, max_length)
    if as_json:
        _print_json(asdict(found))
    else:
        out.print(report.data_report(found), highlight=False)
    if found.num_bad:
        raise typer.Exit(2)


@app.command()
def init(
    path: Annotated[Path, typer.Argument()] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a commented run.yaml to start from."""
    from orchestrator.template import write_template

    write_template(path, force)
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


# --- parsing ----------------------------------------------------------------------------------


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    from orchestrator.config import BadConfig

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise BadConfig(f"{option} takes key=value, got {text!r}")
        found[key] = value
    return found


def _value(text: str, option: str) -> Any:
    import yaml

    from orchestrator.config import BadConfig

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadConfig(f"{option}: the value {text!r} is not YAML") from None


def _numbers(text: str) -> list[float]:
    from orchestrator.config import BadConfig

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadConfig(f"--weights takes numbers such as 1,0.5, got {text!r}") from None


def _absolute(uri: str) -> str:
    """Return a file's URI with an absolute path, so that it means the same from anywhere."""
    scheme, _, rest = uri.partition(":")
    if scheme not in ("jsonl", "csv", "parquet"):
        return uri
    path, mark, options = rest.partition("?")
    return f"{scheme}:{Path(path).expanduser().absolute()}{mark}{options}"


if __name__ == "__main__":
    main()
