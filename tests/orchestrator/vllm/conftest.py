"""A fake of vLLM's HTTP contract, sockets and clients around it, and adapters to deploy.

The fake follows vLLM's documentation (docs/features/lora.md) and the answers of its OpenAI server:
what each release says to a name that is loaded already, to a folder that it cannot see or read, to
a rank above its own, to DoRA and to a key that it does not know. It reads adapters as vLLM does, by
one ``r`` and one ``lora_alpha`` for all layers, whatever patterns the config has.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx
import peft
import pytest
import torch
import uvicorn
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM

from orchestrator import service
from orchestrator.deployments import Deployment
from orchestrator.gateway import Gateway, Keys, Upstream
from orchestrator.gateway_client import RemoteGateway
from orchestrator.rollout import Rollout
from orchestrator.routes import Routes
from orchestrator.vllm import Vllm

POINTER = "bot@production"
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class FakeVllm:
    """A server of one base model.

    Args:
        base: the base model's folder.
        release: ``new`` or ``old``, in which errors are shaped otherwise.
        dynamic: whether VLLM_ALLOW_RUNTIME_LORA_UPDATING is set.
        max_lora_rank: of adapters.
        key: the API key, or None.
        sees: what the server sees a folder as, if not as it is.
    """

    def __init__(self, base, *, release="new", dynamic=True, max_lora_rank=16, key=None, sees=None):
        self.base, self.release, self.key = str(base), release, key
        self.max_lora_rank, self.sees = max_lora_rank, sees or {}
        self.adapters: dict[str, str] = {}
        self.products: dict[str, dict[str, torch.Tensor]] = {}
        self.asked: list[tuple[str, str]] = []
        self.answering: Counter[str] = Counter()
        self.wrongs: list[str] = []
        self.hold: asyncio.Event | None = None
        self.lock = threading.Lock()
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        if dynamic:
            routes += [
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            ]
        self.app = Starlette(routes=routes, exception_handlers={404: self.no_route}, middleware=[])

    def error(self, message, kind="InvalidUserInput", status=400):
        if self.release == "old":
            body = {"object": "error", "message": message, "type": kind, "param": None}
            return JSONResponse({**body, "code": status}, status)
        body = {"message": message, "type": kind, "param": None, "code": status}
        return JSONResponse({"error": body}, status)

    def no_route(self, request, error):
        return JSONResponse({"detail": "Not Found"}, 404)

    def unauthorized(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def models(self, request):
        if (refused := self.unauthorized(request)) is not None:
            return refused
        common = {"object": "model", "created": 1, "owned_by": "vllm", "permission": []}
        rows = [{"id": self.base, "root": self.base, "parent": None, **common}]
        rows += [
            {"id": name, "root": path, "parent": self.base, **common}
            for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def load(self, request):
        if (refused := self.unauthorized(request)) is not None:
            return refused
        body = await request.json()
        if not {"lora_name", "lora_path"} <= body.keys():
            return JSONResponse({"detail": [{"msg": "Field required"}]}, 422)
        name, path = body["lora_name"], body["lora_path"]
        self.asked.append(("load", name))
        if not name or not path:
            return self.error("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters and not body.get("load_inplace"):
            return self.error(f"The lora adapter '{name}' has already been loaded.")
        failed = self.read(
            name,
            Path(self.sees.get(str(Path(path).parent), Path(path).parent)) / Path(path).name,
            path,
        )
        if failed is not None:
            return failed
        with self.lock:
            self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def read(self, name, folder, path):
        if not (folder / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return self.error(message, "NotFoundError", 404)
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, unfit = config["r"], []
        if rank > self.max_lora_rank:
            unfit.append(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        if config.get("use_dora"):
            unfit.append("vLLM does not yet support DoRA.")
        if config.get("modules_to_save"):
            unfit.append("vLLM only supports modules_to_save being None.")
        tensors = load_file(folder / "adapter_model.safetensors")
        layers = sorted({n.partition(".lora_")[0] for n in tensors})
        if strange := [n for n in layers if n.rpartition(".")[2] not in MODULES]:
            unfit.append(f"expected target modules in {MODULES} but received {strange}.")
        if unfit:
            if self.release == "old":
                return self.error(unfit[0], "BadRequestError", 400)
            return self.error(unfit[0], "InternalServerError", 500)
        scaling = config["lora_alpha"] / rank
        self.products[name] = {
            n.removeprefix("base_model.model."): scaling
            * tensors[f"{n}.lora_B.weight"]
            @ tensors[f"{n}.lora_A.weight"]
            for n in layers
        }
        return None

    async def unload(self, request):
        if (refused := self.unauthorized(request)) is not None:
            return refused
        name = (await request.json()).get("lora_name")
        self.asked.append(("unload", name))
        if not name:
            return self.error("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.adapters:
            return self.error(f"The lora adapter '{name}' cannot be found.", "NotFoundError", 404)
        with self.lock:
            del self.adapters[name]
            if self.answering[name]:
                self.wrongs.append(f"{name} was unloaded while it was answering")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request):
        if (refused := self.unauthorized(request)) is not None:
            return refused
        body = await request.json()
        name = body["model"]
        if name not in (self.base, *self.adapters):
            self.wrongs.append(f"{name} was asked and is not loaded")
            return self.error(f"The model `{name}` does not exist.", "NotFoundError", 404)
        self.answering[name] += 1
        if body.get("stream"):
            return StreamingResponse(self.stream(name), media_type="text/event-stream")
        try:
            await asyncio.sleep(0)
            return JSONResponse({"model": name, "choices": [{"text": name, "index": 0}]})
        finally:
            self.answering[name] -= 1

    async def stream(self, name):
        try:
            yield f"data: {json.dumps({'model': name, 'choices': [{'text': 'a'}]})}\n\n".encode()
            if self.hold is not None:
                await self.hold.wait()
            yield b"data: [DONE]\n\n"
        finally:
            self.answering[name] -= 1


class Direct(httpx.BaseTransport):
    """Calls ASGI applications, by host, without a socket; ``heard`` is told around each call."""

    def __init__(self, apps, heard):
        self.apps, self.heard = apps, heard

    def handle_request(self, request):
        if request.url.host not in self.apps:
            raise httpx.ConnectError("connection refused")
        self.heard("before")
        inner = httpx.ASGITransport(self.apps[request.url.host])

        async def call():
            answer = await inner.handle_async_request(request)
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=await answer.aread()
            )

        answer = asyncio.run(call())
        self.heard("after")
        return answer


@pytest.fixture
def fake(tiny_decoder):
    """Return a function that makes a fake vLLM server of the tiny decoder."""
    return lambda **changes: FakeVllm(tiny_decoder, **changes)


@pytest.fixture(scope="session")
def folders(tiny_decoder, tmp_path_factory):
    """Folders of two adapters of which the second has ranks and alphas by layer."""
    place = tmp_path_factory.mktemp("adapters")
    odd = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 7.0}}
    for seed, changes in enumerate(({}, odd)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **changes
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_decoder), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        model.save_pretrained(place / str(seed))
    return place / "0", place / "1"


@pytest.fixture(scope="session")
def made(folders, tmp_path_factory):
    """A home with two versions of bot, the first of which is in production, and their folders."""
    place = tmp_path_factory.mktemp("made")
    workspace = service.open_workspace(place / "home")
    for folder in folders:
        service.import_adapter(workspace, folder, "bot")
    for ref in ("bot:v1", "bot:v2"):
        folder = place / "served" / workspace.store.resolve(ref)[:16]
        service.export(workspace, ref, folder, to=service.ForVllm())
    service.promote(workspace, "bot", "production", "bot:v1")
    workspace.close()
    return place


@pytest.fixture
def bot(made, tmp_path):
    """The workspace with two versions of bot, which were deployed before."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return service.open_workspace(tmp_path / "home")


@pytest.fixture
def place(bot, tmp_path):
    """Return a function that makes a rollout of bot@production, with what it talks to."""

    def make(server, heard=lambda moment: None, gateway=True, **changes):
        routes = Routes([POINTER], tmp_path / "gateway.json")
        upstream = Upstream("http://vllm", server.key, httpx.ASGITransport(server.app))
        front = Gateway(routes, upstream, admin=Keys(["root"]))
        direct = Direct({"vllm": server.app, "gateway": front.app}, heard)
        client = httpx.Client(transport=direct)
        remote = RemoteGateway("http://gateway", "root", client)
        wanted = Deployment(POINTER, "http://vllm", str(tmp_path / "served"), **changes)
        vllm = Vllm("http://vllm", server.key, client)
        return Rollout(bot, wanted, vllm, [remote] if gateway else [], drain_s=5.0)

    return make


@pytest.fixture
def listening():
    """Return a function that answers for an ASGI application on a socket, and gives its url."""
    with ExitStack() as ends:

        def start(app):
            bound = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(app, log_level="critical", access_log=False, ws="none")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
            thread.start()
            ends.callback(thread.join)
            ends.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{bound.getsockname()[1]}"

        yield start
