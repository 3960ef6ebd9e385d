"""``weft eval``: score a version on a data set, or on what clients hold out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal import Fields, JsonFlag, ModelOption, out, pairs, print_json
from orchestrator.terminal import workspace_here as here

if TYPE_CHECKING:  # torch takes seconds, and most commands score nothing
    from orchestrator.asking_clients import Noised
    from orchestrator.client_scores import Table


def evaluate(  # noqa: PLR0913  (one option each)
    ref: str,
    dataset: Annotated[
        str | None, typer.Argument(help="A data set; or else --clients, and none.")
    ] = None,
    labels: Annotated[str, typer.Option(help="Only examples with these labels: a,b.")] = "",
    fields: Fields = "",
    model: ModelOption = None,
    clients: Annotated[
        str | None,
        typer.Option(help="On what clients hold out: all, region=north, or clinic-1,clinic-2."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Keep the clients' scores with the version, called this.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Clients tell noised scores, at this ε.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="δ of it (1e-5).")] = None,
    unit: Annotated[
        str | None, typer.Option(help="Whose presence is hidden: example, or a column.")
    ] = None,
    bound: Annotated[
        float | None, typer.Option(help="Where a loss is cut off; by default twice guessing's.")
    ] = None,
    privacy: Annotated[
        Path | None, typer.Option(help="A run's file, whose privacy section says ε, δ and unit.")
    ] = None,
    accept_unbounded: Annotated[
        bool, typer.Option("--accept-unbounded", help="Clients tell exact scores; give --reason.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why that is accepted; on record for ever.")] = "",
    superlink: Annotated[
        str | None, typer.Option(help="HOST:PORT by which clients at sites are reached.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a version on a data set, or by clients on what they hold out."""
    from orchestrator.config import BadConfig

    given = (epsilon, delta, unit, bound, privacy, name, superlink)
    if clients is None:
        if dataset is None:
            raise BadConfig("give a data set to score on, or --clients to ask clients")
        if any(one is not None for one in given) or accept_unbounded or reason:
            raise BadConfig(
                "--name, --epsilon, --delta, --unit, --bound, --privacy, --superlink and "
                "--accept-unbounded are of clients' scores; give --clients instead of a data set, "
                "or leave them out"
            )
        _on_data(ref, dataset, (labels, fields), model, as_json)
        return
    if dataset is not None or labels or fields:
        raise BadConfig(
            "clients are scored on what they hold out: give --clients or a data set, not both"
        )
    if accept_unbounded != bool(reason):
        raise BadConfig("--accept-unbounded and --reason WHY go together")
    from orchestrator import asking_clients

    noised = _noised(epsilon, delta, unit, bound, privacy)
    if noised is not None and reason:
        raise BadConfig("noised scores are bounded by their ε; leave --accept-unbounded out")
    question = asking_clients.Question(asking_clients.selector(clients), noised, reason or None)
    if name is not None:  # before anything is spent
        asking_clients.refuse_no_name(name)
    workspace = here()
    found = asking_clients.score(workspace, ref, question, model, superlink=superlink)
    if name is not None:
        asking_clients.keep(workspace, ref, name, question, found)
    if as_json:
        print_json(found.to_json())
        return
    _print(found, noised)


def _on_data(
    ref: str, dataset: str, selected: tuple[str, str], model: str | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from clients.assignment import DataSpec
    from orchestrator import service

    labels, fields = selected
    spec = DataSpec(
        dataset,
        pairs(fields.split(",") if fields else [], "--fields"),
        labels=tuple(labels.split(",")) if labels else (),
    )
    found = service.evaluate(here(), ref, spec, model)
    if as_json:
        print_json(asdict(found))
        return
    for key, value in found.metrics.items():
        out.print(f"{key:16s} {value:.4f}", highlight=False)
    for key, value in found.label_accuracy.items():
        out.print(f"  {key:14s} {value:.4f}", style="dim", highlight=False)
    out.print(f"{found.num_examples} examples", style="dim", highlight=False)


def _noised(
    epsilon: float | None,
    delta: float | None,
    unit: str | None,
    bound: float | None,
    file: Path | None,
) -> Noised | None:
    """Return with which privacy scores are told; options go before what a file says.

    Raises:
        BadConfig: if nothing says an ε but something else is said.
    """
    from orchestrator.asking_clients import Noised
    from orchestrator.config import BadConfig, load_config

    said: dict[str, object] = {}
    if file is not None:
        section = load_config(file).dp_sgd
        if section is None or section.epsilon is None:
            raise BadConfig(
                f"{file} has no privacy section with an epsilon at level: example; give --epsilon"
            )
        names = ("epsilon", "delta", "unit", "accountant", "insecure_seed")
        said = {name: getattr(section, name) for name in names}
    options = {"epsilon": epsilon, "delta": delta, "unit": unit, "bound": bound}
    said |= {name: value for name, value in options.items() if value is not None}
    if not said:
        return None
    if "epsilon" not in said:
        raise BadConfig("--delta, --unit and --bound are of noised scores; give --epsilon too")
    return Noised(**said)  # type: ignore[arg-type]  # checked there


def _print(found: Table, noised: Noised | None) -> None:
    from orchestrator.score_report import notes, scores_table

    out.print(scores_table(found))
    for line in notes(found, noised):
        out.print(line, style="dim", highlight=False, markup=False)
