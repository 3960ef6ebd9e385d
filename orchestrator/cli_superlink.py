"""``weft superlink``: the coordinator's post office for sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal import JsonFlag, err, out, print_json, workspace_here

if TYPE_CHECKING:
    from orchestrator.backends.superlink import SuperLink

superlink_app = typer.Typer(help="The SuperLink that sites dial.", no_args_is_help=True)


@superlink_app.command("start")
def start(
    host: Annotated[
        str, typer.Option(help="Address to listen on: this machine's own, or a private one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9092,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="By which a proxy or coordinator elsewhere dials; repeatable."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Its certificate, PEM; by default one is made.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The certificate's key.")] = None,
    authority: Annotated[
        Path | None, typer.Option("--authority", help="Who signed the certificate, PEM.")
    ] = None,
) -> None:
    """Run the SuperLink of this home, and keep the keys that it lets in those of the ledger."""
    import logging
    import threading

    from clients.node.running import stopped_by_signals
    from orchestrator.node_keys import keys_in_step
    from orchestrator.superlink_home import SuperLinkHome
    from orchestrator.superlink_server import Listening, SuperLinkServer, only_one

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    listening = Listening(host, port, tuple(name or ()), certificate, key, authority)
    workspace, stop = workspace_here(), threading.Event()
    own = SuperLinkHome.of(workspace.home)

    def step(link: SuperLink) -> None:
        keys_in_step(link, workspace.ledger)

    def up() -> None:
        err.print(f"the SuperLink answers at {listening.address}; its files: {own.folder}")

    with only_one(own), stopped_by_signals(stop):
        SuperLinkServer(own, listening, stop).serve(step, up)


@superlink_app.command("status")
def status(as_json: JsonFlag = False) -> None:
    """Show if the SuperLink answers, and which nodes it lets in; exit code 1 if it does not."""
    from datetime import UTC, datetime

    from orchestrator.backends.superlink import RuntimeGone
    from orchestrator.superlink_home import superlink_of

    link = superlink_of(workspace_here().home)
    try:
        nodes, problem = link.nodes(), None
    except RuntimeGone as error:
        nodes, problem = [], str(error)
    finally:
        link.close()
    address = link.endpoint.address
    if as_json:
        seen = [{"name": n.name, "status": n.status, "last_seen": n.last_seen} for n in nodes]
        print_json({"address": address, "answers": problem is None, "nodes": seen})
    else:
        out.print(problem or f"{address} answers", markup=False, highlight=False)
        for node in nodes:
            at = datetime.fromtimestamp(node.last_seen, UTC)
            last = f"{at:%Y-%m-%d %H:%M:%S} UTC" if node.last_seen else "never"
            line = f"{node.name:<24} {node.status:<11} seen {last}"
            out.print(line, markup=False, highlight=False)
    raise typer.Exit(1 if problem else 0)
