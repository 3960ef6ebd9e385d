"""``weft deploy``, ``undeploy``, ``deployments`` and ``gateway``: versions on servers of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.terminal import (
    AllowedHosts,
    ConnectionsOption,
    JsonFlag,
    ModelOption,
    err,
    out,
    print_json,
    workspace_here,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.deployments import Deployment
    from orchestrator.keeping_up import KeepingUp
    from orchestrator.rollout import Rollout
    from orchestrator.routes import Switch
    from orchestrator.vllm import Vllm
    from orchestrator.workspace import Workspace

Pointer = Annotated[str, typer.Argument(metavar="NAME@ALIAS")]
Folder = Annotated[Path, typer.Option("--adapters-dir", help="Where adapters are written.")]
Mounted = Annotated[
    str | None, typer.Option("--mounted-at", help="Where the server sees that folder.")
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Convert what is no plain LoRA, to at most this rank.")
]
BaseName = Annotated[
    str | None, typer.Option("--base", help="What the server calls the base model.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="The server's API key; else $VLLM_API_KEY."),
]
GatewayKeyFile = Annotated[
    Path | None, typer.Option("--gateway-key-file", help="The gateways' administrator's key.")
]


def deploy(  # noqa: PLR0913  (one option each)
    pointer: Pointer,
    url: Annotated[str, typer.Option(help="The server's, without /v1.")],
    adapters: Folder,
    to: Annotated[Literal["vllm"], typer.Option(help="What serves there.")] = "vllm",
    mounted: Mounted = None,
    gateways: Annotated[
        list[str], typer.Option("--gateway", help="Switch this gateway; repeat it.")
    ] = [],  # noqa: B006
    api_key: KeyFile = None,
    gateway_key: GatewayKeyFile = None,
    rank: Rank = None,
    base: BaseName = None,
    model: ModelOption = None,
    drain_s: Annotated[
        float, typer.Option("--drain-s", min=0, help="Seconds for requests to the one before.")
    ] = 300.0,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on: promote and rollback are rolled out too.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bring a server and its gateways to where an alias points."""
    from contextlib import ExitStack, closing
    from dataclasses import asdict, replace

    from orchestrator.deployments import Deployment, plain_url
    from orchestrator.gateway_client import RemoteGateway
    from orchestrator.rollout import Rollout
    from orchestrator.vllm import Vllm

    assert to == "vllm"
    url, gateways = plain_url(url), [plain_url(one) for one in gateways]
    if follow and not gateways:
        raise typer.BadParameter("--follow switches a gateway; say which with --gateway URL")
    workspace = workspace_here()
    wanted = Deployment(
        pointer, url, str(adapters.absolute()), mounted, tuple(gateways), rank, base
    )
    adapters.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ends:
        server = ends.enter_context(closing(Vllm(url, _key(api_key, "VLLM_API_KEY"))))
        key = _key(gateway_key)
        switches = [ends.enter_context(closing(RemoteGateway(one, key))) for one in gateways]
        rollout = Rollout(workspace, wanted, server, switches, drain_s, model=model)
        if follow:
            _follow(_following(workspace, [replace(rollout, drain_s=0.0)], gateways[0]))
            return
        done = rollout.run()
    if as_json:
        print_json(asdict(done))
        return
    out.print(f"{done.model} at {url}", highlight=False, markup=False)
    for name in done.unloaded:
        out.print(f"unloaded {name}", style="dim", highlight=False, markup=False)
    for name in done.removed:
        out.print(f"removed {name}", style="dim", highlight=False, markup=False)
    for name in done.left:
        why = "still answering" if gateways else "no gateway says whether it is still asked"
        out.print(f"left {name}: {why}", style="dim", highlight=False, markup=False)


def undeploy(
    pointer: Pointer,
    url: Annotated[str, typer.Option(help="The server's, without /v1.")],
    api_key: KeyFile = None,
    gateway_key: GatewayKeyFile = None,
    drain_s: Annotated[
        float, typer.Option("--drain-s", min=0, help="Seconds for requests to it.")
    ] = 300.0,
) -> None:
    """Take an alias off a server, and off the gateways that it was deployed with."""
    from contextlib import ExitStack, closing

    from orchestrator.deployments import deployed
    from orchestrator.gateway_client import RemoteGateway
    from orchestrator.rollout import Rollout
    from orchestrator.vllm import Vllm

    workspace = workspace_here()
    known = deployed(workspace.home, pointer, url)
    with ExitStack() as ends:
        server = ends.enter_context(closing(Vllm(known.url, _key(api_key, "VLLM_API_KEY"))))
        key = _key(gateway_key)
        switches = [ends.enter_context(closing(RemoteGateway(one, key))) for one in known.gateways]
        unloaded, left = Rollout(workspace, known, server, switches, drain_s).end()
    for name in unloaded:
        out.print(f"unloaded {name}", highlight=False, markup=False)
    for name in left:
        out.print(f"left {name}: still answering", highlight=False, markup=False)
    if left:
        raise typer.Exit(1)


def deployments(
    api_key: KeyFile = None, gateway_key: GatewayKeyFile = None, as_json: JsonFlag = False
) -> None:
    """List what was deployed where, and whether it is where its alias points."""
    from dataclasses import asdict

    from orchestrator.standing import standings

    found = standings(workspace_here(), _key(api_key, "VLLM_API_KEY"), _key(gateway_key))
    if as_json:
        print_json([{**asdict(one), "state": one.state} for one in found])
        return
    if not found:
        out.print("nothing is deployed; weft deploy NAME@ALIAS --to vllm")
    for one in found:
        loaded = ", ".join(model.rpartition(":")[2] for model in one.loaded) or "-"
        line = f"{one.deployment.pointer}  {one.deployment.url}  {loaded}  {one.state}"
        out.print(line, highlight=False, markup=False)
        if one.problem:
            out.print(f"  {one.problem}", style="dim", highlight=False, markup=False)


def gateway(  # noqa: PLR0913  (one option each)
    url: Annotated[str, typer.Option("--to", help="The vLLM server's url, without /v1.")],
    pointers: Annotated[
        list[str], typer.Option("--follow", metavar="NAME@ALIAS", help="Answer for it; repeat it.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters-dir", help="Roll out by itself: where adapters are written."),
    ] = None,
    mounted: Mounted = None,
    rank: Rank = None,
    base: BaseName = None,
    api_key: KeyFile = None,
    client_keys: Annotated[
        Path | None, typer.Option("--client-key-file", help="Keys of clients, one on each line.")
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option("--admin-key-file", help="Keys of who may switch routes.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Where routes are kept; in the home.")
    ] = None,
    names: AllowedHosts = [],  # noqa: B006
    connections: ConnectionsOption = 1000,
    max_body_mib: Annotated[float, typer.Option("--max-body-mib", min=0.001)] = 4.0,
    max_in_flight: Annotated[int, typer.Option("--max-in-flight", min=1)] = 512,
    read_timeout_s: Annotated[
        float, typer.Option("--read-timeout-s", min=0.1, help="Of the server, between two parts.")
    ] = 300.0,
) -> None:
    """Lead requests for a name to the adapter that its alias stands for, on a vLLM server."""
    from contextlib import closing

    from orchestrator.deploying import parse_pointer
    from orchestrator.deployments import plain_url

    try:
        from orchestrator.gateway import Gateway, Keys, Limits, Upstream
        from orchestrator.gateway_server import Place, serve
    except ImportError as error:
        from orchestrator.gateway_client import GatewayUnavailable

        raise GatewayUnavailable(
            f"weft gateway needs the package {error.name}, which is not installed; "
            "pip install 'weft[gateway]'"
        ) from None
    from orchestrator.key_files import read_keys
    from orchestrator.routes import Routes
    from orchestrator.vllm import Vllm
    from orchestrator.workspace import home_folder

    for pointer in pointers:
        parse_pointer(pointer)
    url, key = plain_url(url), _key(api_key, "VLLM_API_KEY")
    kept = state or home_folder() / f"gateway-{port}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    routes = Routes(pointers, kept)
    made = Gateway(
        routes,
        Upstream(url, key),
        Limits(round(max_body_mib * 2**20), max_in_flight, read_s=read_timeout_s),
        Keys(read_keys(client_keys)),
        Keys(read_keys(admin_keys)),
    )
    place = Place(host, port, tuple(names), connections)
    own = f"http://{host}:{port}"
    out.print(f"{own} leads to {url}", highlight=False, markup=False)
    if adapters is None:
        serve(made, None, place)
        return
    adapters.mkdir(parents=True, exist_ok=True)
    wanted = [_deployment(p, url, adapters, mounted, rank, base) for p in pointers]
    with closing(Vllm(url, key)) as server:
        serve(made, _following_here(wanted, server, routes, own), place)


def _deployment(
    pointer: str, url: str, adapters: Path, mounted: str | None, rank: int | None, base: str | None
) -> Deployment:
    from orchestrator.deployments import Deployment

    return Deployment(pointer, url, str(adapters.absolute()), mounted, (), rank, base)


def _following_here(
    wanted: Sequence[Deployment], server: Vllm, switch: Switch, own: str
) -> KeepingUp:
    from orchestrator.deploying import parse_pointer
    from orchestrator.rollout import Rollout

    workspace = workspace_here()
    for one in wanted:
        if workspace.store.pointing(*parse_pointer(one.pointer)) is None:
            line = f"{one.pointer} points nowhere yet: requests for it are answered with 503"
            err.print(line, style="yellow", highlight=False, markup=False)
    rollouts = [Rollout(workspace, one, server, [switch], drain_s=0.0) for one in wanted]
    return _following(workspace, rollouts, own)


def _following(workspace: Workspace, rollouts: Sequence[Rollout], url: str) -> KeepingUp:
    from orchestrator.keeping_up import KeepingUp, Server
    from orchestrator.lease import driver_name
    from storage.followers import Followers

    return KeepingUp(rollouts, Server(driver_name(), url, Followers(workspace.engine)))


def _follow(following: KeepingUp) -> None:
    """Follow until the process is told to end."""
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    following.run(stop)


def _key(path: Path | None, variable: str = "") -> str | None:
    """Return the first key of a file, else what the environment says; empty for none."""
    import os

    from orchestrator.key_files import checked, read_keys

    return read_keys(path)[0] if path else checked(os.environ.get(variable, ""), f"${variable}")
