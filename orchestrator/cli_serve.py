"""``weft serve``: versions that follow their aliases, answered over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.terminal import AllowedHosts, ConnectionsOption, err, out, workspace_here


def serve(  # noqa: PLR0913  (one option each)
    pointers: Annotated[list[str], typer.Argument(metavar="NAME@ALIAS...")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model is, if weft does not know.")
    ] = None,
    host: Annotated[str, typer.Option(help="Of which network interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    url: Annotated[str, typer.Option(help="Under which others reach it, for the followers.")] = "",
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; by default what is there.")
    ] = "",
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="Keys, one a line; else $WEFT_API_KEYS."),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Allow other machines to ask without a key.")
    ] = False,
    names: AllowedHosts = [],  # noqa: B006
    poll_s: Annotated[float, typer.Option(min=0.05, help="How often aliases are looked at.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 32,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of these at most.")] = 65536,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait at most.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt at most.")] = 4096,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer at most.")] = 2048,
    body_bytes: Annotated[int, typer.Option(min=1, help="Of a request at most.")] = 1 << 20,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="That an answer may take.")] = 120.0,
    drain_s: Annotated[float, typer.Option(min=1, help="For answers when it ends.")] = 60.0,
    connections: ConnectionsOption = 1000,
) -> None:
    """Serve what aliases point at over HTTP, as OpenAI's API, and follow every move."""
    from orchestrator.serving import server
    from orchestrator.serving.command import Place, serve_aliases
    from orchestrator.serving.keys import read_api_keys

    limits = server.Limits(
        batch=batch,
        batch_tokens=batch_tokens,
        waiting=waiting,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        body_bytes=body_bytes,
        timeout_s=timeout_s,
        drain_s=drain_s,
        connections=connections,
    )
    place = Place(host, port, url, device, base, poll_s, open_to_all, tuple(names))

    def listening(address: str) -> None:
        out.print(f"serving {', '.join(pointers)} on {address}", highlight=False, markup=False)

    serve_aliases(workspace_here(), pointers, place, limits, read_api_keys(api_keys), listening)
    err.print("drained and ended", highlight=False)
