"""The HTTP face: OpenAI's paths, answered by the engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from clients.serving.classifying import Labelled
from clients.serving.generating import Piece, Prompt
from orchestrator.serving.answers import DONE, Answer, Shape, classified, sse
from orchestrator.serving.asking import Asking, BadPrompt, Tagged, TooLong, WrongKind
from orchestrator.serving.engine import Broken, Engine, Event, Job, Overloaded, Stopping
from orchestrator.serving.errors import error_document, invalid, problem
from orchestrator.serving.guard import Guard, Patience
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.metrics import ServingMetrics, State
from orchestrator.serving.protocol import ChatRequest, ClassifyRequest, CompletionRequest
from orchestrator.serving.shelf import Borrowed, Shelf, UnknownModel

T = TypeVar("T")
VERSION_HEADER = "weft-version"
_BROKEN = {
    "timeout": (504, "the answer was not ready in time; ask for less, or again later", "timeout"),
    "error": (500, "the model failed on the batch that this was in; ask again", "model_failed"),
    "stopped": (503, "the server ended before this was answered; ask again", "stopping"),
    "left": (499, "nobody waits for the answer any more", "left"),
}


class _NotAnswered(Exception):
    """A request that was given up, and why."""

    def __init__(self, why: str) -> None:
        self.status, self.message, self.code = _BROKEN[why]
        super().__init__(self.message)


@dataclass(frozen=True, slots=True)
class Serving:
    """What the face is the face of.

    Attributes:
        engine: answers.
        shelf: knows which version.
        asking: makes tokens.
        state: what is so now.
        timeout_s: seconds that an answer may take.
        base: the base model's name.
        started: seconds since 1970.
    """

    engine: Engine
    shelf: Shelf
    asking: Asking
    state: Callable[[], State]
    timeout_s: float
    base: str
    started: int = field(default_factory=lambda: int(time.time()))


class _Mailbox:
    """What the engine's thread says of a request's jobs, in order, on the event loop."""

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._timeout_s = engine, timeout_s
        self._events: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()
        self._jobs: list[Job] = []
        self._open: set[int] = set()
        self._left = False

    def send(self, asks: Sequence[Any]) -> None:
        """Submit all, or none.

        Raises:
            Overloaded, Stopping: as the engine does.
        """
        try:
            for index, ask in enumerate(asks):
                self._jobs.append(self._engine.submit(ask, self._timeout_s, self._teller(index)))
                self._open.add(index)
        except (Overloaded, Stopping):
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield what is said, with the number of the job, until all are answered.

        Raises:
            _NotAnswered: if one is given up, or nobody waits any more.
        """
        while self._open:
            await self._ready.wait()
            self._ready.clear()
            if self._left:
                raise _NotAnswered("left")
            while self._events:
                index, event = self._events.popleft()
                if event.is_last:
                    self._open.discard(index)
                if isinstance(event, Broken):
                    raise _NotAnswered(event.why)
                yield index, event

    def leave(self) -> None:
        """Wait no more."""
        self._left = True
        self._ready.set()

    def close(self) -> None:
        """Give up what is not answered yet."""
        for index in self._open:
            self._engine.cancel(self._jobs[index])
        self._open.clear()

    def _teller(self, index: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            self._events.append((index, event))
            if len(self._events) == 1:  # whoever wakes up takes all that lie there
                try:
                    self._loop.call_soon_threadsafe(self._ready.set)
                except RuntimeError:  # the loop has ended, and nobody listens
                    self._events.clear()

        return tell


class _Face:
    """The paths' answers."""

    def __init__(self, serving: Serving, metrics: ServingMetrics) -> None:
        self._serving, self._metrics = serving, metrics
        self._one_thread = ThreadPoolExecutor(1, thread_name_prefix="weft-tokens")

    async def completions(self, request: Request, wanted: CompletionRequest) -> Response:
        """Continue prompts."""
        return await self._generated(request, wanted, self._serving.asking.completions, False)

    async def chat(self, request: Request, wanted: ChatRequest) -> Response:
        """Say the next turn."""
        return await self._generated(request, wanted, self._serving.asking.chat, True)

    async def classify(self, request: Request, wanted: ClassifyRequest) -> Response:
        """Label texts."""
        with self._serving.shelf.borrowed(wanted.model) as borrowed:
            served = borrowed.served
            asked = await self._in_tokens(self._serving.asking.texts, wanted, served)
            mailbox = _Mailbox(self._serving.engine, self._serving.timeout_s)
            mailbox.send([one.text if isinstance(one, Tagged) else one for one in asked])
            found: dict[int, Labelled] = {}
            async for index, event in _while_there(request, mailbox):
                assert isinstance(event, Labelled)
                found[index] = event
            document = classified(
                wanted.model, served, asked, [found[i] for i in range(len(asked))]
            )
            tokens = document["usage"]["prompt_tokens"]
            self._metrics.answered(borrowed.pointer, served.version, tokens, 0)
        return JSONResponse(document, headers={VERSION_HEADER: served.version})

    async def _generated(
        self,
        request: Request,
        wanted: CompletionRequest | ChatRequest,
        ask: Callable[[Any, Any], list[Prompt]],
        chat: bool,
    ) -> Response:
        with ExitStack() as stack:
            borrowed = stack.enter_context(self._serving.shelf.borrowed(wanted.model))
            prompts = await self._in_tokens(ask, wanted, borrowed.served)
            mailbox = _Mailbox(self._serving.engine, self._serving.timeout_s)
            mailbox.send(prompts)
            stack.callback(mailbox.close)
            read = sum(len(one.tokens) for one in prompts)
            shape = Shape(wanted.model, borrowed.served.version, chat, read)
            answers = _Answers(shape, borrowed, [Answer() for _ in prompts], self._metrics)
            headers = {VERSION_HEADER: borrowed.served.version}
            if wanted.stream:
                said = answers.stream(mailbox, wanted.tells_usage)
                return _Stream(said, stack.pop_all(), headers)
            async for index, event in _while_there(request, mailbox):
                answers.take(index, event)
            return JSONResponse(answers.done(), headers=headers)

    async def _in_tokens(self, ask: Callable[[Any, Any], T], wanted: Any, served: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._one_thread, ask, wanted, served)

    async def models(self) -> dict[str, Any]:
        """List what is served: each alias, and each version by its id."""
        pointers, made = self._serving.shelf.pointers(), self._serving.started
        named = [(pointer, one.version) for pointer, one in sorted(pointers.items())]
        ids = [(version, version) for version in sorted({one.version for one in pointers.values()})]
        data = [
            {
                "id": id,
                "object": "model",
                "created": made,
                "owned_by": "weft",
                "root": self._serving.base,
                "version": version,
            }
            for id, version in named + [pair for pair in ids if pair not in named]
        ]
        return {"object": "list", "data": data}

    async def health(self) -> Response:
        """Say whether the engine works."""
        alive = self._serving.state().is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def ready(self) -> Response:
        """Say what is served, and what is not as it should be."""
        state = self._serving.state()
        models = {
            pointer: {"version": version, "problem": state.problems.get(pointer)}
            for pointer, version in state.versions.items()
        }
        document = {
            "status": "ready" if state.is_alive else "dead",
            "store": "up" if state.is_store_up else "down",
            "models": models,
        }
        return JSONResponse(document, 200 if state.is_alive else 503)

    async def metrics(self) -> Response:
        """Return the metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


@dataclass(slots=True)
class _Answers:
    """The answers of one request, as they come."""

    shape: Shape
    borrowed: Borrowed
    answers: list[Answer]
    metrics: ServingMetrics
    began: float = field(default_factory=time.monotonic)

    def take(self, index: int, event: Event) -> Piece:
        assert isinstance(event, Piece)
        if event.num_tokens == 1:
            self.metrics.began(time.monotonic() - self.began)
        self.answers[index].add(event)
        return event

    def done(self) -> dict[str, Any]:
        document = self.shape.whole(self.answers)
        used = document["usage"]
        version, pointer = self.borrowed.served.version, self.borrowed.pointer
        self.metrics.answered(pointer, version, used["prompt_tokens"], used["completion_tokens"])
        return document

    async def stream(self, mailbox: _Mailbox, tells_usage: bool) -> AsyncIterator[bytes]:
        try:
            async for index, event in mailbox.events():
                piece = self.take(index, event)
                if piece.text or piece.finish or piece.token or piece.num_tokens == 1:
                    yield self.shape.chunk(index, piece)  # what is held back is no news
            if tells_usage:
                yield self.shape.last([one.pieces[-1].num_tokens for one in self.answers])
            self.done()
        except _NotAnswered as error:
            yield sse({"error": error_document(error.status, error.message, error.code)})
        yield DONE


class _Stream(StreamingResponse):
    """Server-sent events; whatever happens, what the request holds is let go."""

    def __init__(
        self, said: AsyncIterator[bytes], kept: ExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(
            said, media_type="text/event-stream", headers={"cache-control": "no-cache", **headers}
        )
        self._kept = kept

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._kept:
            await super().__call__(scope, receive, send)


async def _while_there(request: Request, mailbox: _Mailbox) -> AsyncIterator[tuple[int, Event]]:
    """Yield what is said as long as who asked is there; else give it up."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        mailbox.leave()

    watcher = asyncio.create_task(watch())
    try:
        async for found in mailbox.events():
            yield found
    finally:
        watcher.cancel()
        mailbox.close()


def create_app(serving: Serving, keys: ApiKeys, patience: Patience) -> Guard:
    """Return the server as an ASGI application.

    Args:
        serving: what it serves.
        keys: who may ask.
        patience: what a connection may take.
    """
    metrics = ServingMetrics(serving.state)
    face = _Face(serving, metrics)
    app = FastAPI(title="weft serve", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _add_errors(app)
    for path, post in (
        ("/v1/completions", face.completions),
        ("/v1/chat/completions", face.chat),
        ("/v1/classify", face.classify),
    ):
        app.post(path, response_model=None)(post)
    for path, get in (
        ("/v1/models", face.models),
        ("/healthz", face.health),
        ("/readyz", face.ready),
        ("/metrics", face.metrics),
    ):
        app.get(path, response_model=None)(get)
    return Guard(app, keys, patience, metrics)


def _add_errors(app: FastAPI) -> None:
    def refusal(status: int, code: str) -> Callable[[Request, Exception], Response]:
        def answer(request: Request, error: Exception) -> Response:
            message = str(error.args[0] if error.args else error)
            return problem(status, message, code)

        return answer

    for kind, status, code in (
        (UnknownModel, 404, "model_not_found"),
        (WrongKind, 400, "wrong_endpoint"),
        (TooLong, 400, "context_length_exceeded"),
        (BadPrompt, 400, "invalid_prompt"),
        (Stopping, 503, "stopping"),
    ):
        app.add_exception_handler(kind, refusal(status, code))

    def overloaded(request: Request, error: Any) -> Response:
        wait = {"retry-after": str(error.retry_after_s)}
        return problem(429, str(error), "overloaded", wait)

    def malformed(request: Request, error: Any) -> Response:
        return problem(400, invalid(error.errors()), "invalid_request")

    def not_answered(request: Request, error: Any) -> Response:
        return problem(error.status, error.message, error.code)

    def other(request: Request, error: Any) -> Response:
        return problem(error.status_code, str(error.detail).lower(), "no_such_path", error.headers)

    app.add_exception_handler(Overloaded, overloaded)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(_NotAnswered, not_answered)
    app.add_exception_handler(HTTPException, other)
