"""The whole server: base model, adapters, engine, follower and face, begun and ended in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clients import models
from clients.assignment import ModelSpec
from clients.serving.bank import BASE, Bank
from clients.serving.classifying import Classifier
from clients.serving.generating import Generator
from clients.tokens import padding_id
from orchestrator.deploying import parse_pointer
from orchestrator.ending import outliving_signals
from orchestrator.serving.asking import Asking, TokenLimits
from orchestrator.serving.engine import Engine, Worker
from orchestrator.serving.following import Follower, Model, Report
from orchestrator.serving.loading import load, spec_of
from orchestrator.serving.metrics import State
from orchestrator.serving.shelf import Served, Shelf
from orchestrator.workspace import Workspace

if TYPE_CHECKING:  # what imports web libraries is imported where they are needed
    from orchestrator.serving.guard import Guard

LINGER_S = 1.0
"""Seconds for which requests are still taken after the signal to end."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
_UNBOUNDED = 1 << 20  # tokens, where a model's config names no limit


class ServingUnavailable(ImportError):
    """A package that the server needs is not installed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    Attributes:
        batch: sequences or texts that are computed at once, >= 1.
        batch_tokens: tokens of these at once, padding and room for answers included.
        waiting: requests that wait at most; further ones are answered with 429.
        prompt_tokens: of a prompt or text at most.
        answer_tokens: of an answer at most.
        inputs: prompts or texts of one request at most.
        timeout_s: seconds that an answer may take, waiting included.
        body_bytes: of a request at most.
        body_s: seconds until all of a request has come.
        write_s: seconds until somebody takes a part of an answer.
        drain_s: seconds that answers have when the server ends.
        connections: at once; further ones are answered with 503.
    """

    batch: int = 32
    batch_tokens: int = 65536
    waiting: int = 256
    prompt_tokens: int = 4096
    answer_tokens: int = 2048
    inputs: int = 64
    timeout_s: float = 120.0
    body_bytes: int = 1 << 20
    body_s: float = 30.0
    write_s: float = 30.0
    drain_s: float = 60.0
    connections: int = 1000


@dataclass(frozen=True, slots=True)
class Assembled:
    """A server without its face.

    Attributes:
        model: the base model, and who runs it.
        shelf: what is served.
        follower: looks after it.
        asking: makes tokens.
        spec: the base model's, and its kind of task.
    """

    model: Model
    shelf: Shelf
    follower: Follower
    asking: Asking
    spec: ModelSpec

    def state(self) -> State:
        """Return what is so now."""
        versions = {pointer: one.version for pointer, one in self.shelf.pointers().items()}
        return State(
            load=self.model.engine.load(),
            versions=versions,
            problems=self.follower.problems(),
            is_store_up=self.follower.is_store_up,
            num_loaded=len(self.model.bank),
            num_switches=self.follower.num_switches,
            is_alive=self.model.engine.is_alive,
        )


@contextmanager
def assembled(
    workspace: Workspace,
    pointers: Sequence[str],
    base: str | None,
    device: str,
    limits: Limits,
    report: Report,
) -> Iterator[Assembled]:
    """Load a base model and what aliases point at, and follow no alias yet.

    On leaving, what waits and runs is answered, and the base model is as it was.

    Args:
        workspace: whose aliases.
        pointers: ``NAME@ALIAS`` each, all of one base model.
        base: where the base model is; None if weft knows.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        limits: what it takes on.
        report: see :class:`orchestrator.serving.following.Follower`.

    Raises:
        BadPointer: if one is no ``NAME@ALIAS``.
        UnknownVersion: if an alias points nowhere.
        Unsigned, OtherBase, Unservable, NotAModel: if what it points at cannot be served.
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not there.
    """
    parsed = {pointer: parse_pointer(pointer) for pointer in pointers}
    spec = spec_of(workspace, pointers[0], base)
    loaded = models.load(spec, device)
    bank = Bank(loaded.backbone)
    try:
        worker = _worker(loaded, bank, limits)
        engine, shelf = Engine(worker, limits.waiting), Shelf()
        model = Model(loaded.backbone, bank, worker, engine)
        engine.start()
        try:
            follower = Follower(
                parsed,
                workspace.store.pointing,
                lambda pointer: load(workspace, pointer, spec, loaded.backbone),
                model,
                shelf,
                report,
            )
            follower.begin()
            if base is not None and spec.kind == "causal-lm":
                shelf.put(Served(spec.hash, BASE, spec.kind))
                shelf.point(base, spec.hash)
            config = loaded.backbone.config.get_text_config()
            context = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
            tokens = TokenLimits(limits.prompt_tokens, limits.answer_tokens, context, limits.inputs)
            asking = Asking(loaded.tokenizer, tokens, config.vocab_size)
            yield Assembled(model, shelf, follower, asking, spec)
            follower.stop()
        finally:
            engine.close()
    finally:
        bank.close()


def _worker(loaded: models.Base, bank: Bank, limits: Limits) -> Worker:
    if loaded.spec.kind == "causal-lm":
        return Generator(loaded.backbone, loaded.tokenizer, bank, limits.batch, limits.batch_tokens)
    pad = padding_id(loaded.tokenizer)
    return Classifier(loaded.backbone, bank, pad, limits.batch, limits.batch_tokens)


def best_device() -> str:
    """Return ``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that a server can listen on; port 0 is any free one.

    Raises:
        OSError: if the address is taken or none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        error.filename = f"{host}:{port}"  # the command line says which
        raise
    return made


def run(
    app: Guard,
    listening: socket.socket,
    limits: Limits,
    names: Collection[str] | None,
    ended: Callable[[], None],
) -> None:
    """Answer over HTTP until SIGTERM or SIGINT, then finish what was begun.

    For a second after the signal the server still takes requests, whose connections end with the
    answer: whoever sent one before hearing of it is answered, and a balancer sees that it is not
    ready. Then it listens no more.

    Args:
        app: the ASGI application.
        listening: bound, from :func:`bound`.
        limits: of its connections, and of the seconds that answers have from the signal on.
        names: under which it is asked; None for any.
        ended: called when no more is answered.
    """
    import uvicorn

    from orchestrator.connections import Connections, KnownNames

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.begin_to_end()
            await asyncio.sleep(LINGER_S)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        KnownNames(app, names),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(limits.drain_s)),
        **Connections(limits.connections).settings(),
    )
    with outliving_signals():
        try:
            Server(config).run(sockets=[listening])
        finally:
            listening.close()
            ended()
