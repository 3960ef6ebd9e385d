"""What the connections of our HTTP servers may take, and under which names they are asked.

uvicorn waits for ever for a request's head, and for who does not take what was written; and no
server knows by itself that a web page whose name was pointed at this machine (DNS rebinding) asks
as if it were one of its own. Both servers here, ``weft serve`` and ``weft gateway``, end that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import resource
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.serving.errors import error_document, problem

_LOG = logging.getLogger(__name__)
_SPARE_FILES = 256  # beside connections: the store, the model, libraries


@dataclass(frozen=True, slots=True)
class Connections:
    """What connections may take.

    Attributes:
        most: at once; whoever comes then is answered 503.
        head_s: seconds until all of a request's head has come, from its first byte on; of the first
            one from the connection's beginning on.
        keep_alive_s: seconds for which one may be silent: longer than clients keep theirs in a
            pool, so that none is closed as it is used again.
    """

    most: int = 1000
    head_s: float = 20.0
    keep_alive_s: int = 75

    def settings(self) -> dict[str, Any]:
        """Return what uvicorn is to know of them; see to enough open files for two of each."""
        _allow_files(2 * self.most + _SPARE_FILES)
        patient = type("Patient", (_Patient,), {"allowed": self})
        return {"http": patient, "ws": "none", "timeout_keep_alive": self.keep_alive_s}


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _full() -> bytes:
    body = {"error": error_document(503, "too many connections are open; ask again later", "full")}
    text = json.dumps(body).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
    )


class _Patient(H11Protocol):
    allowed: Connections
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.allowed.most:
            transport.write(_full())
            transport.close()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._expect_no_more()
        elif self._late is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_more()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing waits for who does not take what was written

    def _expect(self) -> None:
        self._late = self.loop.call_later(self.allowed.head_s, self.timeout_keep_alive_handler)

    def _expect_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def is_local(host: str) -> bool:
    """Return whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def known_names(host: str, allowed: Iterable[str] = ()) -> frozenset[str] | None:
    """Return the names under which a server is asked, or None for any.

    Args:
        host: where it listens. On this machine alone it has that one's names, besides those that
            are allowed; elsewhere it has those alone, or any where none is.
        allowed: names or addresses, without ports.
    """
    found = {_name(one if one.count(":") < 2 else f"[{one.strip('[]')}]") for one in allowed}
    if is_local(host):
        return frozenset(found | {"localhost", "127.0.0.1", "::1", host.lower()})
    return frozenset(found) or None


def _name(host: str) -> str:
    """Return a ``Host`` header without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


class KnownNames:
    """ASGI middleware that answers what is asked under a known name, and 421 else.

    Args:
        app: what answers.
        names: from :func:`known_names`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] | None) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] == "http" and self._names is not None:
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if not hosts or any(_name(host) not in self._names for host in hosts):
                _LOG.warning("a request under a name that is not this server's was refused")
                message = (
                    "this server is not asked under this name; who runs it allows one more with "
                    "--allowed-host NAME"
                )
                await problem(421, message, "unknown_host")(scope, receive, send)
                return
        await self._app(scope, receive, send)
