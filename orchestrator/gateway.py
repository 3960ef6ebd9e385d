"""A gateway in front of a vLLM server: requests for a name go to the adapter it stands for now.

A request takes its model from :class:`orchestrator.routes.Routes` and keeps it to its end, streamed
or not, whatever is switched meanwhile. The gateway needs no store to answer: routes are kept in a
file of its own. Adapters are loaded and unloaded by :mod:`orchestrator.rollout`, never through it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from orchestrator.gateway_metrics import GatewayMetrics
from orchestrator.key_files import KnownKeys
from orchestrator.routes import NoRoute, Routes

FORWARDED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")
"""What is passed on; above all not vLLM's endpoints that load and unload adapters."""

_UP = ("content-type", "accept", "user-agent", "x-request-id")
_DOWN = ("content-type", "content-encoding", "cache-control", "retry-after", "x-request-id")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a gateway takes.

    Attributes:
        body_bytes: of a request, at most.
        in_flight: requests at once; those above are told to come again (429).
        connect_s: seconds within which the server must take a connection.
        read_s: seconds within which the server must send something more.
        client_s: seconds within which a client must have sent its request, and take each part of
            the answer.
    """

    body_bytes: int = 4 << 20
    in_flight: int = 512
    connect_s: float = 5.0
    read_s: float = 300.0
    client_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server behind a gateway.

    Attributes:
        url: of the server.
        key: its API key, which clients never see, or None.
        transport: what speaks HTTP to it, or None for the network.
    """

    url: str
    key: str | None = None
    transport: httpx.AsyncBaseTransport | None = None


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP's.
        message: a sentence for who asked.
        kind: OpenAI's ``type``.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Keys:
    """Some keys, of which one must be shown.

    Args:
        keys: the keys; none is asked for where there is none.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._known = KnownKeys(keys)

    def __bool__(self) -> bool:
        return bool(self._known)

    def check(self, request: Request) -> None:
        """Refuse a request without a key.

        Raises:
            Refused: if it shows none of them.
        """
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._known and not self._known.know(shown):
            raise Refused(
                401, "the API key is missing or unknown; send Authorization: Bearer KEY", "auth"
            )


class Gateway:
    """The gateway's ASGI application.

    Attributes:
        app: the application.
        routes: which adapter answers for which name.
        limits: what is taken.
        metrics: what Prometheus is told.
        client: what asks the server.
        upstream_key: the server's API key, or None.

    Args:
        routes: which adapter answers for which name.
        upstream: the server.
        limits: what is taken.
        keys: of clients; none is needed where there is none.
        admin: of who may switch routes; nobody may over HTTP where there is none.
    """

    def __init__(
        self,
        routes: Routes,
        upstream: Upstream,
        limits: Limits | None = None,
        keys: Keys | None = None,
        admin: Keys | None = None,
    ) -> None:
        self.routes, self.limits = routes, limits or Limits()
        self._keys, self._admin = keys or Keys(), admin or Keys()
        self.metrics = GatewayMetrics(routes)
        self.upstream_key = upstream.key
        self._reading = 0
        self.client = httpx.AsyncClient(
            base_url=upstream.url.rstrip("/"),
            transport=upstream.transport,
            timeout=httpx.Timeout(self.limits.read_s, connect=self.limits.connect_s),
            limits=httpx.Limits(),  # in_flight is the limit
        )
        self.app = Starlette(
            routes=[
                *(Route(path, self._asked(self._forward), methods=["POST"]) for path in FORWARDED),
                Route("/v1/models", self._asked(self._models)),
                Route("/weft/routes", self._administered(self._show)),
                Route("/weft/routes/{pointer}", self._administered(self._flip), methods=["PUT"]),
                Route("/weft/routes/{pointer}", self._administered(self._drop), methods=["DELETE"]),
                Route("/healthz", self._healthy),
                Route("/readyz", self._ready),
                Route("/metrics", self._measured),
            ],
            exception_handlers={Refused: _refusal, 404: _unknown_path, 405: _unknown_path},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> Any:
        yield
        await self.client.aclose()

    def _asked(self, answer: Callable[[Request], Awaitable[Any]]) -> Any:
        async def checked(request: Request) -> Any:
            self._keys.check(request)
            return await answer(request)

        return checked

    def _administered(self, answer: Callable[[Request], Awaitable[Any]]) -> Any:
        async def checked(request: Request) -> Any:
            if not self._admin:
                raise Refused(
                    403,
                    "routes are not told or switched from outside; start the gateway with "
                    "--admin-key-file",
                    "auth",
                )
            self._admin.check(request)
            return await answer(request)

        return checked

    async def _healthy(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        missing = [p for p in self.routes.pointers if p not in self.routes.models()]
        if missing:
            raise Refused(503, f"nothing is deployed for {', '.join(missing)} yet", "unavailable")
        return JSONResponse({"status": "ok"})

    async def _measured(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        models = self.routes.models()
        rows = [
            {"id": name, "object": "model", "owned_by": "weft", "root": models[pointer]}
            for name, pointer in self.routes.names().items()
            if pointer in models
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def _show(self, request: Request) -> Response:
        shown = {"routes": self.routes.models(), "in_flight": self.routes.flights()}
        return JSONResponse(shown)

    async def _flip(self, request: Request) -> Response:
        document = _document(await self._body(request))
        pointer, model = request.path_params["pointer"], document.get("model")
        if not isinstance(model, str) or not model.startswith(f"{pointer}:"):
            raise Refused(400, f"model must be a text that begins with {pointer}:, got {model!r}")
        try:
            await anyio.to_thread.run_sync(self.routes.flip, pointer, model)
        except NoRoute as error:
            raise Refused(404, error.args[0]) from None
        return JSONResponse({"pointer": pointer, "model": model})

    async def _drop(self, request: Request) -> Response:
        pointer = request.path_params["pointer"]
        await anyio.to_thread.run_sync(self.routes.drop, pointer)
        return JSONResponse({"pointer": pointer, "model": None})

    async def _forward(self, request: Request) -> Any:
        if self._reading + sum(self.routes.flights().values()) >= self.limits.in_flight:
            self.metrics.count("", 429)
            raise Refused(429, "too many requests are being answered; try again", "overloaded")
        self._reading += 1  # from here on it has a place: bodies take memory, too
        try:
            document = _document(await self._body(request))
        finally:
            self._reading -= 1
        name = document.get("model")
        if not isinstance(name, str):
            raise Refused(400, f"model must be a text, got {repr(name)[:200]}")
        return _Relay(self, request, name, document)

    async def _body(self, request: Request) -> bytes:
        parts, size, most = [], 0, self.limits.body_bytes
        try:
            with anyio.fail_after(self.limits.client_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise Refused(413, f"a request may have {most} bytes, this one has more")
        except TimeoutError:
            raise Refused(
                408, f"the request was not sent within {self.limits.client_s:g} seconds"
            ) from None
        except ClientDisconnect:
            raise Refused(400, "the client left") from None
        return b"".join(parts)


class _Relay:
    """The answer to one request: what the server says, part by part, as it says it."""

    def __init__(
        self, gateway: Gateway, request: Request, name: str, document: dict[str, Any]
    ) -> None:
        self._gateway, self._request = gateway, request
        self._name, self._document = name, document

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; if the client leaves, the server is told so by the end of its connection."""
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await self._answer(scope, receive, send)
            group.cancel_scope.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        pointer = gateway.routes.names().get(self._name, "")
        begun = _Begun(send, gateway.limits.client_s)
        try:
            with gateway.routes.taken(self._name) as model:
                await self._relay(model, begun)
        except (NoRoute, Refused, httpx.HTTPError, TimeoutError) as error:
            if begun.status is None:
                refusal = self._refusal(error)
                begun.status = refusal.status
                await _refused(refusal)(scope, receive, send)
            # else the answer ends before its end, which the client notices
        finally:
            gateway.metrics.count(pointer, begun.status or 0)

    async def _relay(self, model: str, begun: _Begun) -> None:
        gateway, started = self._gateway, time.monotonic()
        asked = gateway.client.stream(
            "POST",
            self._request.scope["path"],  # not .url, of which Host is a part
            content=json.dumps({**self._document, "model": model}).encode(),
            headers=self._headers(),
        )
        async with asked as answer:
            gateway.metrics.first_byte(time.monotonic() - started)
            if answer.status_code == 404 and model in (await answer.aread()).decode("latin-1"):
                raise Refused(
                    503, f"{self._name} is not loaded at the server just now; try again", "unloaded"
                )
            read = answer.is_stream_consumed  # then it is decoded too
            kept = [
                (name, value)
                for name, value in answer.headers.multi_items()
                if name in _DOWN and not (read and name == "content-encoding")
            ]
            await begun.start(answer.status_code, [*kept, ("x-weft-model", model)])
            if read:
                await begun.part(answer.content)
            else:
                async for part in answer.aiter_raw():
                    await begun.part(part)
            await begun.part(b"", more=False)

    def _headers(self) -> dict[bytes, bytes]:
        given = self._request.headers
        found = {name: given[name] for name in _UP if name in given}
        found["accept-encoding"] = given.get("accept-encoding", "identity")
        # a kept connection may be closed, by the server or by httpx's pool, as it is used again:
        # a request would be lost of which nobody knows whether it was begun
        found["connection"] = "close"
        key = self._gateway.upstream_key
        found |= {"authorization": f"Bearer {key}"} if key else {}
        return {name.encode(): value.encode("latin-1") for name, value in found.items()}

    def _refusal(self, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, NoRoute):
            if error.args[0]:
                return Refused(503, error.args[0], "unavailable")
            known = ", ".join(self._gateway.routes.names())
            return Refused(
                404,
                f"no model is called {self._name[:200]!r} here; there are: {known}",
                "not_found",
            )
        if isinstance(error, httpx.TimeoutException):
            return Refused(504, "the server did not answer in time", "timeout")
        return Refused(502, "the server cannot be reached", "unavailable")


class _Begun:
    """An answer on its way to a client.

    Attributes:
        status: HTTP's, once it has begun.
    """

    def __init__(self, send: Send, client_s: float) -> None:
        self._send, self._client_s = send, client_s
        self.status: int | None = None

    async def start(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        self.status = status
        coded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._say({"type": "http.response.start", "status": status, "headers": coded})

    async def part(self, body: bytes, more: bool = True) -> None:
        await self._say({"type": "http.response.body", "body": body, "more_body": more})

    async def _say(self, message: Message) -> None:
        with anyio.fail_after(self._client_s):
            await self._send(message)


def _document(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the request must be a JSON object, got {type(found).__name__}")
    return found


def _refused(error: Refused) -> Response:
    body: Mapping[str, Any] = {
        "error": {"message": str(error), "type": error.kind, "code": error.status}
    }
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(body, error.status, headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _refused(error)


async def _unknown_path(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _refused(Refused(status, f"there is no {request.method} {request.url.path} here"))
