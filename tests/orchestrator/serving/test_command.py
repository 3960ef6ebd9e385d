"""The whole server on a socket: it says where it is, answers, and ends when it has answered."""

import asyncio
import signal
import socket
import sys
import threading

import httpx
import pytest
import uvicorn

from orchestrator.serving import server
from orchestrator.serving.command import OpenToAll, Place, ServingUnavailable, serve_aliases
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.server import Limits
from storage.followers import Followers

CATS = {"model": "cats", "prompt": "the cat", "max_tokens": 20}


@pytest.fixture
def cats(publish, move):
    version = publish("cats", 1)
    move("cats@production", version)
    return version


def test_a_signal_under_load_ends_the_server_when_all_that_was_begun_is_answered(
    workspace, cats, monkeypatch
):
    servers, addresses = [], []
    up = threading.Event()

    class Kept(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    def listening(address):
        url = httpx.URL(address)
        socket.create_connection((url.host, url.port)).close()  # from now on nobody is turned away
        addresses.append(address)
        up.set()

    monkeypatch.setattr(uvicorn, "Server", Kept)
    running = threading.Thread(
        target=serve_aliases,
        args=(
            workspace,
            ["cats@production"],
            Place(port=0, device="cpu"),
            Limits(batch=2),
            ApiKeys(),
            listening,
        ),
    )
    running.start()
    assert up.wait(60)

    async def load(followers):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=addresses[0], limits=limits, timeout=60) as client:
            assert (await client.get("/readyz")).json()["status"] == "ready"
            (follower,) = followers.following("cats", "production")
            assert (follower.url, follower.version) == (addresses[0], cats)
            asked = [
                asyncio.create_task(
                    client.post("/v1/completions", json=CATS | {"stream": number % 2 == 0})
                )
                for number in range(12)
            ]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            servers[0].handle_exit(signal.SIGTERM, None)  # two at a time: most wait or run still
            while (await client.get("/readyz")).status_code != 503:
                await asyncio.sleep(0)
            return await asyncio.gather(*asked)

    followers = Followers(workspace.engine)
    answers = asyncio.run(load(followers))
    running.join(60)
    assert not running.is_alive()
    assert followers.following() == []  # it ended, and said so
    assert [answer.status_code for answer in answers] == [200] * 12
    for number, answer in enumerate(answers):
        if number % 2:
            assert answer.json()["choices"][0]["finish_reason"]
        else:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "error" not in answer.text


def test_a_server_that_others_reach_asks_for_keys_or_is_told_not_to(workspace, cats):
    with pytest.raises(OpenToAll, match="--api-key-file, or say --open"):
        serve_aliases(workspace, ["cats@production"], Place("0.0.0.0"), Limits(), ApiKeys(), print)


def test_an_address_that_is_taken_is_named(workspace, cats):
    with server.bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            serve_aliases(
                workspace, ["cats@production"], Place(port=port), Limits(), ApiKeys(), print
            )


def test_without_its_packages_the_server_says_what_to_install(workspace, cats, monkeypatch):
    monkeypatch.setitem(sys.modules, "orchestrator.serving.app", None)
    with pytest.raises(ServingUnavailable, match=r"pip install 'weft\[serve\]'"):
        serve_aliases(workspace, ["cats@production"], Place(), Limits(), ApiKeys(), print)
