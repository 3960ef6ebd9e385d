"""``weft clients``: register clients and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.terminal import Fields, JsonFlag, out, pairs, print_json, workspace_here

clients_app = typer.Typer(help="Register clients and look at them.", no_args_is_help=True)


@clients_app.command("add")
def clients_add(  # noqa: PLR0913  (one option each)
    name: Annotated[str | None, typer.Argument(help="Of the client; with --from, none.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Data set: jsonl:/path, csv:, hf:, …")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget, for good.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    fields: Fields = "",
    examples: Annotated[int | None, typer.Option(help="Declared size.", min=1)] = None,
    population: Annotated[str | None, typer.Option(help="Whose data it is.")] = None,
    public: Annotated[bool, typer.Option("--public", help="The data are public.")] = False,
    check: Annotated[bool, typer.Option(help="Look at the data set now.")] = True,
    file: Annotated[
        Path | None,
        typer.Option("--from", help="Register all clients that a .csv or .jsonl file lists."),
    ] = None,
) -> None:
    """Register a client, a data set that takes part, or all that a file lists."""
    from orchestrator import registering
    from orchestrator.config import BadConfig
    from storage.ledger import ClientRecord

    described = (data, epsilon, delta, label, fields, examples, population, public)
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
    as_json: JsonFlag = False,
) -> None:
    """List registered clients by name, all or those with these labels."""
    from orchestrator import report, views

    records = workspace_here().ledger.clients(pairs(label, "--label"), limit, after)
    if as_json:
        print_json([views.client_json(r) for r in records])
        return
    out.print(report.clients_table(records))
    if len(records) == limit:
        out.print(f"more: --after {records[-1].name}", style="dim")


@clients_app.command("show")
def clients_show(name: str, as_json: JsonFlag = False) -> None:
    """Show a client and what its population has spent."""
    from orchestrator import epsilons, report, views

    workspace = workspace_here()
    record = workspace.ledger.client(name)
    spent = epsilons.spent_by_population(workspace, record.population)
    if as_json:
        print_json({**views.client_json(record), "spent": spent})
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
    ledger = workspace_here().ledger
    population = ledger.client(name).population
    ledger.set_budget(population, epsilon, delta)
    budget = "none" if epsilon is None else f"ε {epsilon:g} (δ {delta:g})"
    out.print(f"{population}: budget {budget}", highlight=False, markup=False)


@clients_app.command("remove")
def clients_remove(name: str) -> None:
    """Forget a client; what its population has spent stays for ever."""
    workspace_here().ledger.remove_client(name)
    out.print(f"removed {name}", highlight=False)


@clients_app.command("forget")
def clients_forget(name: str) -> None:
    """Delete the examples that a client kept to rehearse in later tasks, at the site here."""
    from orchestrator.withdrawing import forget_examples

    count = forget_examples(workspace_here(), name)
    out.print(f"{name}: files of kept examples deleted: {count}", highlight=False, markup=False)


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
    for run in done.later:
        out.print(f"run {run} buries what it holds after its round", highlight=False)
    for one in done.deployed:
        line = f"deployed with it: {one.pointer}  {one.version}"
        out.print(line, highlight=False, markup=False)
    out.print("nothing is unlearned: these versions stay as they are", style="dim")
