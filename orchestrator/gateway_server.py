"""A gateway as a process: its socket, and the thread that follows aliases."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import uvicorn

from orchestrator.connections import Connections, KnownNames, known_names
from orchestrator.ending import outliving_signals
from orchestrator.gateway import Gateway
from orchestrator.keeping_up import KeepingUp

SHUTDOWN_S = 30
"""For requests that are being answered when the process is told to end."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway listens.

    Attributes:
        host: of which network interface.
        port: of it.
        names: under which it is asked, besides this machine's own.
        connections: at once; further ones are answered with 503.
    """

    host: str
    port: int
    names: tuple[str, ...] = ()
    connections: int = 1000


def serve(gateway: Gateway, following: KeepingUp | None, place: Place) -> None:
    """Answer until the process is told to end; then finish what is being answered."""
    stop = threading.Event()
    thread = threading.Thread(target=following.run, args=(stop,)) if following else None
    settings = uvicorn.Config(
        KnownNames(gateway.app, known_names(place.host, place.names)),
        host=place.host,
        port=place.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        **Connections(place.connections).settings(),
    )
    if thread is not None:
        thread.start()
    with outliving_signals():
        try:
            uvicorn.Server(settings).run()
        finally:
            stop.set()
            if thread is not None:
                thread.join()
