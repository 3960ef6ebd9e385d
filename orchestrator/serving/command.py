"""What ``weft serve`` does, from the socket to the last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestrator.deploying import parse_pointer
from orchestrator.lease import driver_name
from orchestrator.serving import server
from orchestrator.serving.announcing import Announcer
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.server import Limits, ServingUnavailable
from orchestrator.workspace import Workspace
from storage.followers import Followers


class OpenToAll(ValueError):
    """A server that other machines reach would ask for no key."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a server runs.

    Attributes:
        host: of which network interface.
        port: 0 for any free one.
        url: under which others reach it; empty for host and port.
        device: empty for the best there is.
        base: where the base model is; None if weft knows.
        poll_s: seconds between two looks at the aliases, > 0.
        open_to_all: whether other machines may ask without a key.
        names: under which it is asked, besides this machine's own and ``url``'s.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    url: str = ""
    device: str = ""
    base: str | None = None
    poll_s: float = 1.0
    open_to_all: bool = False
    names: tuple[str, ...] = ()


def serve_aliases(
    workspace: Workspace,
    pointers: Sequence[str],
    place: Place,
    limits: Limits,
    keys: ApiKeys,
    listening: Callable[[str], None],
) -> None:
    """Serve what aliases point at until SIGTERM or SIGINT, and finish what was begun.

    Args:
        workspace: whose aliases.
        pointers: ``NAME@ALIAS`` each, all of one base model.
        place: where and how.
        limits: what it takes on.
        keys: who may ask.
        listening: told the address, once whoever asks there is answered.

    Raises:
        ServingUnavailable: if a package is not installed.
        OpenToAll: if other machines could ask without a key, and nobody said that they may.
        OSError: if the address is taken.
        UnknownVersion, Unsigned, OtherBase, Unservable: see
            :func:`orchestrator.serving.server.assembled`.
    """
    try:
        from orchestrator.connections import is_local, known_names
        from orchestrator.serving.app import Serving, create_app
        from orchestrator.serving.guard import Patience
    except ImportError as error:
        raise ServingUnavailable(
            f"weft serve needs the package {error.name}, which is not installed; "
            "pip install 'weft[serve]'"
        ) from None
    if not keys and not is_local(place.host) and not place.open_to_all:
        raise OpenToAll(
            f"other machines reach {place.host}, and no API key is asked for; give keys with "
            "--api-key-file, or say --open"
        )
    own = [urlsplit(place.url).hostname or ""] if place.url and is_local(place.host) else []
    names = known_names(place.host, [*place.names, *own])
    socket = server.bound(place.host, place.port)
    port = socket.getsockname()[1]
    host = f"[{place.host}]" if ":" in place.host else place.host
    address = f"http://{host}:{port}"
    device = place.device or server.best_device()

    followers = Followers(workspace.engine)
    named = {pointer: parse_pointer(pointer) for pointer in pointers}
    announcer = Announcer(followers, driver_name(), place.url or address, named)
    with server.assembled(
        workspace, pointers, place.base, device, limits, announcer.report
    ) as made:
        face = Serving(
            made.model.engine,
            made.shelf,
            made.asking,
            made.state,
            limits.timeout_s,
            place.base or made.spec.id,
        )
        patience = Patience(limits.body_bytes, limits.body_s, limits.write_s)
        announcer.begin()
        made.follower.look()
        made.follower.start(place.poll_s)

        def ended() -> None:
            made.follower.stop()
            announcer.end()

        app = create_app(face, keys, patience)
        socket.listen(server.BACKLOG)  # who comes before the first answer waits for it
        listening(address)
        server.run(app, socket, limits, names, ended)
