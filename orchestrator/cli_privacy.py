"""``weft privacy``: what was spent of people's privacy, what a run would spend, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.terminal import JsonFlag, Set, out, print_json, workspace_here

if TYPE_CHECKING:
    from orchestrator.auditing import Audit
    from orchestrator.statements import Statement
    from storage.records import Policy

privacy_app = typer.Typer(
    help="Privacy budgets: spent, planned, left; what a run would spend; a report.",
    no_args_is_help=True,
)


@privacy_app.command("status")
def status(
    names: Annotated[
        list[str] | None, typer.Argument(help="Populations or clients; all by default.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="What this version has inherited instead.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    after: Annotated[
        str, typer.Option("--after", help="Only names that come after this: the next page.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Show what is spent, planned and left, by population and run, or of one version."""
    from orchestrator import statements

    if version is not None:
        _of_version(version, as_json)
        return
    found = statements.statements(workspace_here(), names or (), limit, after)
    if as_json:
        print_json([one.to_json() for one in found])
        return
    for one in found:
        _print_statement(one)
    if not found:
        out.print("nobody's privacy is on record: no client is registered, nothing was spent")
    if len(found) == limit:
        out.print(f"more: --after {found[-1].population}", style="dim", markup=False)


def _of_version(ref: str, as_json: bool) -> None:
    from orchestrator import statements

    found = statements.of_version(workspace_here(), ref)
    if as_json:
        print_json(found)
        return
    for one in found:
        limit = f", of a budget of {one['budget']['epsilon']:g}" if one["budget"] else ""
        line = f"{one['population']}: {one['text']}{limit}"
        out.print(line, highlight=False, markup=False)
    if not found:
        out.print(f"{ref} has inherited no spend: no ε is known for it", highlight=False)


def _print_statement(one: Statement) -> None:
    limit = one.budget
    shown = (
        f"budget ε = {limit.epsilon:g} (δ = {limit.delta:g}), policy {limit.policy}"
        if limit
        else "no budget"
    )
    out.print(f"[bold]{escape(one.population)}[/]  {shown}", highlight=False)
    spent = "; ".join(map(str, one.spent)) or "nothing"
    left = "" if one.left is None else f", left ε = {one.left:.2f}"
    out.print(f"  spent    {spent}{left}", highlight=False, markup=False)
    if one.planned != one.spent:
        planned = "; ".join(map(str, one.planned))
        out.print(f"  planned  {planned}, with the runs that go on", highlight=False, markup=False)
    if one.related:
        names = ", ".join(one.related)
        line = f"  shares records with {names}, whose spends count"
        out.print(line, highlight=False, markup=False)
    for run in one.runs:
        cost = "; ".join(map(str, run.spent))
        of = f"  {run.version[:12]}" if run.version else ""
        line = f"  run {run.run} {run.name} {run.status}{of}: {run.rounds} rounds, {cost}"
        out.print(line, highlight=False, markup=False)
    for bare in one.unprotected:
        why = f"accepted by {bare.who}: {bare.reason}" if bare.reason else "there was no budget"
        line = f"  run {bare.run}: without DP, no ε bounds what it tells ({why})"
        out.print(line, style="red", highlight=False, markup=False)


@privacy_app.command("plan")
def plan(config: Path, overrides: Set = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Show a run's noise and ε, a round and in all, and what it leaves; train nothing."""
    from orchestrator import forecasting
    from orchestrator.config import load_config

    found = forecasting.forecast(workspace_here(), load_config(config, overrides))
    if as_json:
        print_json(found.to_json())
        return
    cut = "" if found.rounds == found.asked_rounds else f" of the {found.asked_rounds} asked for"
    out.print(f"{found.name}: {found.rounds} rounds{cut}", highlight=False, markup=False)
    for one in found.clients:
        out.print(
            f"{one.client}: noise multiplier {one.noise_multiplier:g}, sample rate "
            f"{one.sample_rate:.3g}, {one.steps} steps a round, {one.rounds} rounds at most",
            highlight=False,
            markup=False,
        )
        line = f"  a round {one.one_round}; in all {one.whole}"
        out.print(line, highlight=False, markup=False)
        if one.against_coordinator is not None:
            line = (
                f"  in all against the coordinator, which sees it alone: {one.against_coordinator}"
            )
            out.print(line, highlight=False, markup=False)
        values = {name: f"{value:.2f}" for name, value in one.by_accountant.items()}
        line = (
            f"  in all by accountant: prv {values['prv']} and rdp {values['rdp']}, upper bounds; "
            f"gdp {values['gdp']}, an approximation that may be too low and judges nothing"
        )
        out.print(line, style="dim", highlight=False, markup=False)
    for effect in found.budgets:
        out.print(
            f"budget of {effect.population}: ε = {effect.before:.2f} of {effect.limit:g} is spent, "
            f"{effect.after:.2f} with this run, {max(0.0, effect.limit - effect.after):.2f} left "
            f"(δ = {effect.delta:g})",
            highlight=False,
            markup=False,
        )
    if not found.precedents:
        out.print("what the noise costs in accuracy is not known before it is tried", style="dim")
        return
    out.print("of the same model, labels, adapter, strategy and held-back data were", style="dim")
    for before in found.precedents:
        out.print(f"  {before}", highlight=False, markup=False)


@privacy_app.command("budget")
def budget(
    population: str,
    epsilon: Annotated[float | None, typer.Option(help="ε in all; leave out for none.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Of a run it is too little for: refuse, shorten or ask.")
    ] = None,
) -> None:
    """Set what a population may spend in all, and what becomes of runs that would pass it."""
    from storage.records import POLICIES
    from storage.registry import BadBudget

    chosen: Policy | None = next((one for one in POLICIES if one == policy), None)
    if policy is not None and chosen is None:
        raise BadBudget(f"a budget's policy is {', '.join(POLICIES)}, got {policy!r}")
    ledger = workspace_here().ledger
    ledger.set_budget(population, epsilon, delta, chosen)
    limit = "none" if epsilon is None else f"ε {epsilon:g} (δ {delta:g})"
    kept = ledger.policies()[population]
    out.print(f"{population}: budget {limit}, policy {kept}", highlight=False, markup=False)


@privacy_app.command("audit")
def audit(  # noqa: PLR0913  (one option each)
    target: Annotated[str, typer.Argument(help="A run's file, or a run: its id or name.")],
    overrides: Set = [],  # noqa: B006
    white_box: Annotated[
        bool,
        typer.Option(
            "--white-box/--black-box",
            help="Gradients in the run's steps; or examples in a whole run on public data.",
        ),
    ] = True,
    canaries: Annotated[int, typer.Option(min=1, help="How many; more prove more.")] = 1000,
    guesses: Annotated[
        int | None, typer.Option(min=1, help="Of how many canaries; an eighth by default.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Whose privacy; by default who is claimed to spend most.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="At which ε is claimed and bounded; the run's by default.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="That the bound is right.")] = 0.95,
    as_json: JsonFlag = False,
) -> None:
    """Attack a run's noise by canaries; exit 1 if that proves a larger ε than is claimed.

    By white box nobody's data are read; what is found on a run is recorded on its newest version.
    """
    from orchestrator import auditing, planting
    from orchestrator.config import BadConfig, load_config

    attack = auditing.Attack(canaries, guesses, client, delta, confidence)
    is_file = Path(target).is_file()
    if is_file and white_box:
        found = auditing.audit_config(workspace_here(), Path(target), attack, overrides)
    elif is_file:
        config = load_config(target, overrides)
        found = planting.audit_by_training(workspace_here(), config, attack)
    elif not white_box:
        raise BadConfig(f"{target} is no file: a black-box audit trains what a run's file asks for")
    elif overrides:
        raise BadConfig(f"{target} is no file, and a run that there is cannot be changed by --set")
    else:
        found = auditing.audit_run(workspace_here(), target, attack)
    if as_json:
        print_json(found.to_json())
    else:
        _print_audit(found)
    if found.refuted:
        raise typer.Exit(1)


def _print_audit(found: Audit) -> None:
    def line(text: str, style: str = "") -> None:
        out.print(text, style=style, highlight=False, markup=False)

    claim, made = found.claim, found.guesses
    line(
        f"{found.name}: {made.right} of {made.made} guesses right, of {made.canaries} "
        f"{found.kind}, for {found.client}"
    )
    line(f"claimed  {claim}")
    line(f"proved   ε >= {found.bound:.2f} at that δ, with confidence {found.confidence:g}")
    if found.refuted:
        line(
            "the claim is refuted: what the client releases tells more than it says. The clipping, "
            "the sampling, the noise or the accounting is wrong; release nothing that it made",
            style="red",
        )
    elif found.sample_rate < 1:
        line(
            f"no contradiction. A step took a canary with probability {found.sample_rate:.3g} "
            "only, which hides it; the attack is sharpest with a batch_size of all data",
            style="dim",
        )
    else:
        line("no contradiction; an attack that fails proves nothing", style="dim")
    if found.version is not None:
        line(f"recorded on {found.version[:12]}")


@privacy_app.command("report")
def report(
    ref: str,
    to: Annotated[Path, typer.Option("--to", help="Folder to write into.")] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Write what a version says of people's privacy, for a board, as HTML and Markdown."""
    from orchestrator import privacy_report

    found = privacy_report.privacy_report(workspace_here(), ref)
    if as_json:
        print_json(found.to_json())
        return
    for path in privacy_report.written(found, to):
        out.print(str(path), highlight=False, markup=False)
