"""``weft node``: a site's own side. Imports no server part, so that a site needs none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli_joining import init, join, rotate
from orchestrator.terminal import JsonFlag, err, out, print_json

node_app = typer.Typer(help="A site: its data, budgets and keys stay here.", no_args_is_help=True)
node_app.command()(init)
node_app.command()(join)
node_app.command()(rotate)


@node_app.command("models")
def models(
    folder: Annotated[Path, typer.Argument(help="With the model's config and *.safetensors.")],
    quantization: Annotated[Literal["none", "nf4", "int8"], typer.Option()] = "none",
    compute_dtype: Annotated[Literal["float32", "bf16", "fp16"], typer.Option()] = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Print the line of node.yaml's models that lets runs use the base model in FOLDER."""
    from clients.assignment import ModelSpec
    from clients.weights import ModelNotFound, base_hash

    place = folder.expanduser().absolute()
    if not place.is_dir():  # a name that is no folder would be looked for on the Hub
        raise ModelNotFound(f"there is no folder {place}; name the one that holds the base model")
    spec = ModelSpec(
        str(place), "classification", quantization=quantization, compute_dtype=compute_dtype
    )
    found = base_hash(spec)
    if as_json:
        print_json({found: str(place)})
    else:
        out.print(f'"{found}": {place}', markup=False, highlight=False)


NodeFile = Annotated[Path, typer.Argument(help="The node's file.")]


@node_app.command("check")
def check(file: NodeFile = Path("node.yaml"), as_json: JsonFlag = False) -> None:
    """Look at what node.yaml names: key, certificates, base models, data, state."""
    from dataclasses import asdict

    from clients.node.checks import checks
    from clients.node.settings import load_settings

    found = list(checks(load_settings(file)))
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        for one in found:
            mark, style = ("ok  ", "green") if one.good else ("WRONG", "red")
            out.print(f"{mark:<6}{one.key}: {one.text}", style=style, markup=False, highlight=False)
    if not all(one.good for one in found):
        raise typer.Exit(2)


@node_app.command("status")
def status(
    file: NodeFile = Path("node.yaml"),
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute ε anew, by the tight accountant: seconds.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what ran here, what was sent, and what it cost, from the site's own ledger."""
    from clients.node.settings import load_settings
    from clients.node.status import status as found_at
    from orchestrator.node_tables import status_tables

    found = found_at(load_settings(file), exact)
    if as_json:
        print_json(found)
        return
    for table in status_tables(found):
        out.print(table)


@node_app.command("start")
def start(file: NodeFile = Path("node.yaml")) -> None:
    """Dial the SuperLink and answer what is asked, until it is stopped (SIGTERM, Ctrl-C)."""
    import logging
    import threading

    from clients.node import running
    from clients.node.checks import refuse_unready
    from clients.node.settings import load_settings

    settings, stop = load_settings(file), threading.Event()
    logging.getLogger("clients").setLevel(logging.INFO)
    with running.alone(settings), running.stopped_by_signals(stop):
        refuse_unready(settings)
        from clients.flower_site import Answering, serve
        from clients.node.resident import Resident

        offered = ", ".join(settings.data)
        err.print(
            f"{settings.name} dials {settings.superlink} and offers {offered}; "
            f"see: weft node status {file}",
            markup=False,
            highlight=False,
        )
        running.start(
            settings,
            lambda address, secret, answer, end: serve(
                Answering(address, secret, most_bytes=settings.policy.max_order_mb << 20),
                answer,
                end,
            ),
            stop,
            Resident(settings, stop).answer,
        )
