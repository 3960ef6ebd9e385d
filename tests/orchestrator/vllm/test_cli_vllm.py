"""The commands that deploy, list what is deployed, and start a gateway."""

from __future__ import annotations

import signal
import sys

import httpx
import pytest
import uvicorn

from orchestrator import gateway_server, service
from orchestrator.gateway import Gateway, Keys, Upstream
from orchestrator.routes import Routes

POINTER = "bot@production"


@pytest.fixture
def live(bot, fake, listening, tmp_path):
    """A vLLM server with a key and a gateway in front of it, on sockets."""
    server = fake(key="secret")
    (tmp_path / "vllm.key").write_text("secret\n")
    (tmp_path / "admin.key").write_text("root\n")
    url = listening(server.app)
    routes = Routes([POINTER], tmp_path / "routes.json")
    front = listening(Gateway(routes, Upstream(url, "secret"), admin=Keys(["root"])).app)
    return server, url, front


@pytest.fixture
def keys(tmp_path):
    return (
        *("--api-key-file", tmp_path / "vllm.key"),
        *("--gateway-key-file", tmp_path / "admin.key"),
    )


def test_an_alias_is_deployed_and_listed(bot, live, keys, ok, read, tmp_path):
    server, url, front = live
    options = ("--url", url, "--adapters-dir", tmp_path / "new", "--gateway", front, *keys)
    said = ok("deploy", POINTER, "--to", "vllm", *options)
    first = f"{POINTER}:{bot.store.resolve('bot:v1')[:16]}"
    assert said.splitlines() == [f"{first} at {url}"]
    assert [folder.name for folder in (tmp_path / "new").glob("[!.]*")] == [
        first.rpartition(":")[2]
    ]
    assert f"{POINTER}  {url}  {first.rpartition(':')[2]}  in step" in ok("deployments", *keys)
    service.promote(bot, "bot", "production", "bot:v2")
    [row] = read("deployments", *keys)
    assert (row["state"], row["loaded"], row["leads"]) == ("behind", [first], {front: first})
    done = read("deploy", POINTER, *options)
    assert (done["unloaded"], done["left"]) == ([first], [])
    assert read("deployments", *keys)[0]["state"] == "in step"
    [row] = read("deployments")
    assert row["state"] == "unknown"
    assert "refuses the API key" in row["problem"]
    assert server.wrongs == []
    assert ok("undeploy", POINTER, "--url", f"{url}/", *keys) == f"unloaded {done['model']}\n"
    assert (server.adapters, read("deployments", *keys)) == ({}, [])
    assert ok("deployments") == "nothing is deployed; weft deploy NAME@ALIAS --to vllm\n"


def test_what_was_not_deployed_cannot_be_undeployed(bot, refused):
    said = refused("undeploy", POINTER, "--url", "http://vllm:8000")
    assert said.startswith(f"{POINTER} was not deployed to http://vllm:8000 from here")


def test_a_gateway_without_its_packages_says_what_to_install(refused, monkeypatch, tmp_path):
    for name in ("orchestrator.gateway", "orchestrator.gateway_server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    said = refused("gateway", "--to", "http://x", "--follow", POINTER)
    assert "which is not installed; pip install 'weft[gateway]'" in said


def test_a_gateway_that_follows_no_alias_is_refused(refused):
    assert "an alias is written NAME@ALIAS" in refused(
        "gateway", "--to", "http://x", "--follow", "bot"
    )


def test_a_gateway_says_which_of_its_aliases_point_nowhere(bot, weft, tmp_path, monkeypatch):
    monkeypatch.setattr(gateway_server, "serve", lambda *given: None)
    followed = ("--follow", POINTER, "--follow", "bot@prodution")
    options = ("--adapters-dir", tmp_path / "served", "--to", "http://x")
    code, _, said = weft("gateway", *followed, *options)
    assert code == 0
    assert said == "bot@prodution points nowhere yet: requests for it are answered with 503\n"


def test_following_without_a_gateway_is_refused(weft):
    code, _, said = weft("deploy", POINTER, "--url", "http://x", "--adapters-dir", "a", "--follow")
    assert code == 2
    assert "say which with --gateway" in said


def test_a_server_that_is_not_there_is_one_line(bot, refused, tmp_path):
    options = ("--url", "http://127.0.0.1:1", "--adapters-dir", tmp_path / "served")
    assert refused("deploy", POINTER, *options).startswith("no vLLM answers at http://127.0.0.1:1")


def test_a_gateway_rolls_out_by_itself_until_it_is_told_to_end(
    bot, live, ok, tmp_path, monkeypatch
):
    server, url, _ = live
    seen = {}

    class Told(uvicorn.Server):
        """Listens on a port of its own choice; answers one request, and is told to end."""

        async def startup(self, sockets=None):
            await super().startup(sockets)
            port = self.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"

        async def on_tick(self, counter):
            if await super().on_tick(counter):
                return True
            async with httpx.AsyncClient() as client:
                body = {"model": "bot", "prompt": "a"}
                answer = await client.post(f"{self.url}/v1/completions", json=body, timeout=30)
            if answer.status_code == 200:
                seen.update(answer.json())
                signal.raise_signal(signal.SIGTERM)
            return False

    init = uvicorn.Config.__init__
    monkeypatch.setattr(
        uvicorn.Config, "__init__", lambda self, app, **o: init(self, app, **{**o, "port": 0})
    )
    monkeypatch.setattr(uvicorn, "Server", Told)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        options = ("--adapters-dir", tmp_path / "served", "--api-key-file", tmp_path / "vllm.key")
        said = ok("gateway", "--to", url, "--follow", POINTER, *options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"leads to {url}" in said
    assert seen["model"] == f"{POINTER}:{bot.store.resolve('bot:v1')[:16]}"
    assert list(server.adapters) == [seen["model"]]
