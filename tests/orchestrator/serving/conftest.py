"""A store with small adapters, and the server on them, with or without a socket."""

import asyncio
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from orchestrator.serving.app import Serving, create_app
from orchestrator.serving.guard import Patience
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.server import Limits, assembled

PATIENCE = Patience(body_bytes=20_000, body_s=5.0, write_s=5.0)


@pytest.fixture
def move(workspace):
    """Return a function that points an alias at a version."""

    def to(pointer, version):
        name, alias = pointer.split("@")
        workspace.store.promote(name, alias, version, who="me", why="")

    return to


@pytest.fixture
def serve(workspace):
    """Return a context manager: the server of some aliases, and what it reports."""

    @contextmanager
    def begin(*pointers, base=None, keys=(), patience=PATIENCE, **limits):
        said = []
        with assembled(
            workspace,
            pointers,
            base,
            "cpu",
            Limits(**{"batch": 8, "timeout_s": 60.0, **limits}),
            lambda *what: said.append(what),
        ) as made:
            made.follower.repeat_s = float("inf")
            face = Serving(
                made.model.engine,
                made.shelf,
                made.asking,
                made.state,
                limits.get("timeout_s", 60.0),
                "base",
            )
            yield made, create_app(face, ApiKeys(keys), patience), said

    return begin


@asynccontextmanager
async def client_of(app, **options):
    """Yield a client that asks an ASGI application without a socket."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://weft", **options) as client:
        yield client


def ask(app, *requests, **options):
    """Return the answers to (path, body) requests, sent at once."""

    async def all_of_them():
        async with client_of(app, **options) as client:
            return await asyncio.gather(
                *(
                    client.get(path) if body is None else client.post(path, json=body)
                    for path, body in requests
                )
            )

    return asyncio.run(all_of_them())
