"""A gateway as a process: its socket, and the thread that follows aliases."""

from __future__ import annotations

import threading

import uvicorn

from orchestrator.ending import outliving_signals
from orchestrator.gateway import Gateway
from orchestrator.keeping_up import KeepingUp

SHUTDOWN_S = 30
"""For requests that are being answered when the process is told to end."""
KEEP_ALIVE_S = 75
"""Seconds that a connection may be silent: longer than clients keep theirs in a pool."""


def serve(gateway: Gateway, following: KeepingUp | None, host: str, port: int) -> None:
    """Answer until the process is told to end; then finish what is being answered."""
    stop = threading.Event()
    thread = threading.Thread(target=following.run, args=(stop,)) if following else None
    settings = uvicorn.Config(
        gateway.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
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
