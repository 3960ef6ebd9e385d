"""``weft clients``: register clients and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import cli_nodes
from orchestrator.terminal import Fields, JsonFlag, out, pairs, print_json, workspace_here

clients_app = typer.Typer(help="Register clients and look at them.", no_args_is_help=True)
clients_app.command()(cli_nodes.approve)
clients_app.command()(cli_nodes.disable)
clients_app.command()(cli_nodes.enable)
clients_app.command()(cli_nodes.remove)
clients_app.command()(cli_nodes.rotate)


@clients_app.command("add")
def clients_add(  # noqa: PLR0913  (one option each)
    name: Annotated[str | None, typer.Argument(help="Of the client; with --from, none.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="jsonl:/path, csv:, parquet:, hf:, builtin:."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget, for good.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    fields: Fields = "",
    examples: Annotated[int | None, typer.Option(help="Declared size.", min=1)] = None,
    population: Annotated[str | None, typer.Option(help="Whose data it is.")] = None,
    public: Annotated[bool, typer.Option("--public", help="The data are public.")] = False,
    holdout: Annotated[
        str | None,
        typer.Option(help="Never trained on: 0.1, 0.1:COLUMN of people, or another data set."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Look at the data set now.")] = True,
    file: Annotated[
        Path | None,
        typer.Option("--from", help="Register all clients that a .csv or .jsonl file lists."),
    ] = None,
    join: Annotated[
        Path | None, typer.Option("--join", help="Let in a site's node by the file that it sent.")
    ] = None,
    pending: Annotated[
        bool, typer.Option("--pending", help="With --join: somebody else approves it.")
    ] = False,
    expires: Annotated[
        int | None, typer.Option(min=1, help="With --join: days for which its key is good at most.")
    ] = None,
    fingerprint: cli_nodes.Fingerprint = None,
) -> None:
    """Register a client, all that a file lists, or the data that a site's node offers."""
    from orchestrator import registering
    from orchestrator.config import BadConfig
    from storage.ledger import ClientRecord

    described = (data, epsilon, delta, label, fields, examples, population, public, holdout)
    if join is not None:
        from orchestrator.nodes import Terms

        if name is not None or file is not None or any((*described[:3], *described[4:])):
            raise BadConfig("--join FILE describes its data itself; leave the rest to its site")
        labels = pairs(label, "--label")
        cli_nodes.admit(join, Terms(pending, labels, expires, fingerprint))
        return
    if pending or expires or fingerprint:
        raise BadConfig("--pending, --expires and --fingerprint go with --join FILE")
    if file is not None:
        if name is not None or any(described):
            raise BadConfig(
                "--from FILE describes its clients itself; only --no-check goes with it"
            )
        made = registering.register_clients(workspace_here(), file, check)
        out.print(f"registered {len(made)} clients of {file}", highlight=False, markup=False)
        return
    if name is None or data is None:
        raise BadConfig("give a client's NAME and --data, or --from FILE for many")
    record = ClientRecord(
        name=name,
        data=data,
        population=population or name,
        fields=pairs(fields.split(",") if fields else [], "--fields"),
        num_examples=examples,
        epsilon=epsilon,
        delta=delta,
        labels=pairs(label, "--label"),
        public=public,
        holdout=holdout,
    )
    workspace = workspace_here()
    record = registering.register_client(workspace, record, check)
    budget = f"ε {record.epsilon:g} (δ {record.delta:g})" if record.epsilon is not None else "none"
    out.print(
        f"registered {record.name}: {record.num_examples} examples, budget {budget}",
        highlight=False,
        markup=False,
    )
    if related := sorted(workspace.ledger.relations.of(record.population)):
        line = f"shares records with {', '.join(related)}: what is spent on one counts for each"
        out.print(line, highlight=False, markup=False)


@clients_app.command("list")
def clients_list(
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    limit: Annotated[int, typer.Option(min=1)] = 50,
    after: Annotated[
        str, typer.Option("--after", help="Only names that come after this: the next page.")
    ] = "",
    pending: Annotated[
        bool, typer.Option("--pending", help="Sites' nodes that wait for approval instead.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List registered clients by name, all or those with these labels; whose node is there."""
    from orchestrator import node_views, views

    if pending:
        cli_nodes.list_pending(as_json)
        return
    ledger = workspace_here().ledger
    records = ledger.clients(pairs(label, "--label"), limit, after)
    nodes = node_views.views(ledger, [r.name for r in records])
    if as_json:
        sites = {name: node.to_json() for name, node in nodes.items()}
        print_json([{**views.client_json(r), "site": sites.get(r.name)} for r in records])
        return
    out.print(node_views.clients_table(records, nodes))
    if len(records) == limit:
        out.print(f"more: --after {records[-1].name}", style="dim")


@clients_app.command("show")
def clients_show(name: str, as_json: JsonFlag = False) -> None:
    """Show a client and what its population has spent; of a site, also its node."""
    from orchestrator import epsilons, node_views, views
    from storage.ledger import UnknownClient

    workspace = workspace_here()
    try:
        record = workspace.ledger.client(name)
    except UnknownClient:
        if cli_nodes.show_node(workspace.ledger, name, as_json):
            return
        raise
    nodes = node_views.views(workspace.ledger, [name])
    spent = epsilons.spent_by_population(workspace, record.population)
    if as_json:
        site = nodes[name].to_json() if name in nodes else None
        print_json({**views.client_json(record), "spent": spent, "site": site})
        return
    out.print(node_views.clients_table([record], nodes))
    out.print(f"spent: {spent['text']}", highlight=False)
    if name in nodes:
        cli_nodes.show_node(workspace.ledger, nodes[name].record.name, as_json)


@clients_app.command("budget")
def clients_budget(
    name: str,
    epsilon: Annotated[float | None, typer.Option(help="ε in all; leave out for none.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
) -> None:
    """Change the privacy budget of a client's population; what was spent stays spent."""
    ledger = workspace_here().ledger
    population = ledger.client(name).population
    ledger.set_budget(population, epsilon, delta)
    budget = "none" if epsilon is None else f"ε {epsilon:g} (δ {delta:g})"
    out.print(f"{population}: budget {budget}", highlight=False, markup=False)


@clients_app.command("forget")
def clients_forget(name: str) -> None:
    """Delete the examples that a client kept to rehearse in later tasks, at the site here."""
    from orchestrator.withdrawing import forget_examples, node_of

    count, node = forget_examples(workspace_here(), name), node_of(workspace_here(), name)
    out.print(f"{name}: files of kept examples deleted: {count}", highlight=False, markup=False)
    _say_not_deleted(node)


@clients_app.command("withdraw")
def clients_withdraw(
    name: str,
    why: Annotated[str, typer.Option(help="For the record.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Stop using a client for good, bury what it sent and kept, and list where it is deployed."""
    from dataclasses import asdict

    from orchestrator import service

    done = service.withdraw(workspace_here(), name, why)
    if as_json:
        record = {**asdict(done.record), "created_at": done.record.created_at.isoformat()}
        print_json({**asdict(done), "record": record})
        return
    out.print(f"{name} withdrew; {done.buried} stored updates are buried", highlight=False)
    if done.forgotten:
        line = f"files of examples that it kept, deleted: {done.forgotten}"
        out.print(line, highlight=False)
    _say_not_deleted(done.node)
    for run in done.later:
        out.print(f"run {run} buries what it holds after its round", highlight=False)
    for one in done.deployed:
        line = f"deployed with it: {one.pointer}  {one.version}"
        out.print(line, highlight=False, markup=False)
    out.print("nothing is unlearned: these versions stay as they are", style="dim")


def _say_not_deleted(node: str) -> None:
    """Say of a client at a site what no command here can do."""
    if node:
        line = (
            f"at the site of node {node} nothing was deleted: what it keeps of its examples, keys "
            "and updates is in its own state folder, and its owner's to delete"
        )
        out.print(line, highlight=False, markup=False, soft_wrap=True)
