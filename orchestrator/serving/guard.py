"""What every request passes: its key, its size, its time, and patience with who reads slowly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.errors import problem
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.metrics import ServingMetrics

_LOG = logging.getLogger(__name__)
OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that ask for no key."""
PATHS = OPEN | {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/classify"}


@dataclass(frozen=True, slots=True)
class Patience:
    """What a connection may take.

    Attributes:
        body_bytes: of a request's body at most.
        body_s: seconds until all of it has come.
        write_s: seconds until somebody takes a part of an answer that is ready.
    """

    body_bytes: int
    body_s: float
    write_s: float


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class TooSlow(OSError):
    """Who asked does not take the answer; the connection is given up."""


class Guard:
    """ASGI middleware around the server.

    Args:
        app: what is guarded.
        keys: who is let in.
        patience: what a connection may take.
        metrics: told of each request.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, patience: Patience, metrics: ServingMetrics
    ) -> None:
        self._app, self._keys, self._patience, self._metrics = app, keys, patience, metrics
        self._ends = False

    def begin_to_end(self) -> None:
        """Say that the server is not ready any more, and that connections end with their answer."""
        self._ends = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer that it is not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # nobody there any more

        async def patient(message: Message) -> None:
            nonlocal status
            if self._ends and message["type"] == "http.response.start":
                ending = (b"connection", b"close")
                message = {**message, "headers": [*message.get("headers", ()), ending]}
            try:
                async with asyncio.timeout(self._patience.write_s):
                    await send(message)
            except TimeoutError:
                _LOG.warning("a client did not take its answer; the connection is given up")
                raise TooSlow("an answer was not taken in time") from None
            if message["type"] == "http.response.start":
                status = message["status"]

        try:
            if self._ends and scope["path"] == "/readyz":
                raise _Refused(503, "the server is about to end; ask another one", "stopping")
            self._check_key(scope)
            await self._app(scope, await self._whole(scope, receive), patient)
        except _Refused as error:
            answer = problem(error.status, error.message, error.code, error.headers)
            await answer(scope, receive, patient)
        except (TooSlow, ClientDisconnect):
            status = 499
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requested(path, status, time.monotonic() - began)

    def _check_key(self, scope: Scope) -> None:
        headers = _headers(scope)
        if scope["path"] not in OPEN and not self._keys.admits(headers.get("authorization")):
            raise _Refused(
                401,
                "this server wants an API key of its own, as the header Authorization: Bearer KEY",
                "invalid_api_key",
                **{"www-authenticate": "Bearer"},
            )

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """Return a body that was read, and is let through at once."""
        body, limit = bytearray(), self._patience.body_bytes
        declared = _headers(scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._patience.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise _Refused(
                408,
                f"the request did not come whole within {self._patience.body_s:g} s",
                "request_timeout",
                connection="close",
            ) from None
        waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again


def _too_large(limit: int) -> _Refused:
    return _Refused(
        413,
        f"a request has at most {limit} bytes; send less at once",
        "request_too_large",
        connection="close",
    )


def _headers(scope: Mapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
