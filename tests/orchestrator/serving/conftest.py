"""A store with small adapters, and the server on them, with or without a socket."""

import asyncio
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from orchestrator.bases import remember_base
from orchestrator.recipes import import_recipe
from orchestrator.serving.app import Serving, create_app
from orchestrator.serving.guard import Patience
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.server import Limits, assembled

PATIENCE = Patience(body_bytes=20_000, body_s=5.0, write_s=5.0)
LABELS = {"classification": ("cat", "dog", "model"), "token-classification": ("O", "B-T", "I-T")}


@pytest.fixture
def publish(workspace, tiny_decoder, tiny_encoder):
    """Return a function that commits a version with random tensors and names it."""

    def make(name, seed=0, kind="causal-lm", base=None, seen=None, **options):
        folder = base or (tiny_decoder if kind == "causal-lm" else tiny_encoder)
        targets = ["q_proj", "v_proj"] if kind == "causal-lm" else ["query", "value"]
        labels = LABELS.get(kind, ())
        spec = ModelSpec(str(folder), kind, labels=labels, max_length=16)
        spec = ModelSpec(
            str(folder), kind, labels=labels, max_length=16, hash=models.base_hash(spec)
        )
        remember_base(workspace, spec)
        choice = PluginChoice("lora", {"r": 2, "target_modules": targets, **options})
        tensors = models.shapes(spec, ADAPTERS.get("lora").build(**choice.options))
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            key: torch.randn(shape, generator=generator) if shape else torch.tensor(1.0)
            for key, shape in tensors.items()
        }
        recipe = import_recipe(spec, choice, seen or labels, {"seed": seed}, None)
        version = workspace.store.commit(drawn, parents={}, recipe=recipe)
        workspace.store.name(name, version)
        return version

    return make


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
