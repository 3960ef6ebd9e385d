"""``weft clients``: register clients and look at them."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.terminal import Fields, JsonFlag, out, pairs, print_json, workspace_here

clients_app = typer.Typer(help="Register clients and look at them.", no_args_is_help=True)


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
        data=data,
        population=population or name,
        fields=pairs(fields.split(",") if fields else [], "--fields"),
        num_examples=examples,
        epsilon=epsilon,
        delta=delta,
        labels=pairs(label, "--label"),
        public=public,
    )
    made = service.register_client(workspace_here(), record, check)
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
    from orchestrator import report, views

    records = workspace_here().ledger.clients(pairs(label, "--label"))
    if as_json:
        print_json([views.client_json(r) for r in records])
    else:
        out.print(report.clients_table(records))


@clients_app.command("show")
def clients_show(name: str, as_json: JsonFlag = False) -> None:
    """Show a client and what its population has spent."""
    from orchestrator import report, service, views

    workspace = workspace_here()
    record = workspace.ledger.client(name)
    spent = service.spent_by_population(workspace, record.population)
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
