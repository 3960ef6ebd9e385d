"""Connections that send nothing, or too slowly, or under another's name, take no place for long."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from orchestrator.connections import Connections, KnownNames, is_local, known_names

ANSWER = b"x" * 5_000_000


async def said(request):
    await request.body()
    return PlainTextResponse("said")


async def much(request):
    return PlainTextResponse(ANSWER)


APP = Starlette(routes=[Route("/", said, methods=["GET", "POST"]), Route("/much", much)])


@contextmanager
def serving(**changes):
    """Yield the address of a server, and its uvicorn."""
    settings = Connections(**changes).settings()
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(APP, log_config=None, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield bound.getsockname(), server
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def connected(address, *parts):
    with socket.create_connection(address, timeout=30) as made:
        for part in parts:
            made.sendall(part)
        yield made


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nhost: a\r\nx-slow: "])
def test_a_head_that_does_not_come_whole_ends_its_connection(begun):
    with serving(head_s=0.05) as (address, _), connected(address, begun) as silent:
        assert silent.recv(100) == b""


def test_a_head_that_comes_byte_by_byte_gets_no_more_time_for_each():
    with serving(head_s=0.3) as (address, _), connected(address, b"GET / HTTP/1.1\r\n") as slow:
        slow.settimeout(0.01)
        for _ in range(10_000):
            try:
                slow.sendall(b"x")
                if slow.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        raise AssertionError("the server took it all")


def test_the_head_of_a_later_request_has_its_time_too():
    whole = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
    with serving(head_s=1.0) as (address, _), connected(address, whole) as kept:
        answer = b""
        while part := not answer.endswith(b"said") and kept.recv(1000):
            answer += part
        assert answer.endswith(b"said")
        kept.sendall(b"GET / HT")
        assert kept.recv(100) == b""


class Clock:
    """A loop's timers, which never go off, and tasks, which are never run."""

    def __init__(self):
        self.timers = []

    def call_later(self, seconds, work):
        self.timers.append([seconds, work])
        return SimpleNamespace(cancel=partial(self.timers.remove, self.timers[-1]))

    def create_task(self, work):
        work.close()
        return MagicMock()


def test_only_a_head_that_is_not_whole_is_waited_for():
    settings = Connections(head_s=7.0).settings()
    config = uvicorn.Config(APP, log_config=None, lifespan="off", **settings)
    config.load()
    clock = Clock()
    made = config.http_protocol_class(config, ServerState(), {}, clock)
    made.connection_made(MagicMock(is_closing=lambda: False))
    for part in (b"POST / HTTP/1.1\r\n", b"host: a\r\ncontent-length: 2\r\n"):
        made.data_received(part)
        assert [seconds for seconds, _ in clock.timers] == [7.0]
    for part in (b"\r\n", b"a", b"b"):
        made.data_received(part)
        assert clock.timers == []
    made.connection_lost(None)


def test_a_connection_too_many_is_told_so_and_the_others_are_answered():
    with serving(most=1) as (address, _), connected(address) as first:
        with connected(address) as second:
            answer = b""
            while part := second.recv(1000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert b"too many connections are open" in answer
        first.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert first.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_who_does_not_take_an_answer_is_given_up():
    request = b"GET /much HTTP/1.1\r\nhost: a\r\n\r\n"
    with serving(keep_alive_s=0) as (address, server), connected(address, request) as deaf:
        assert deaf.recv(4) == b"HTTP"
        left = threading.Event()
        for _ in range(1000):
            if not server.server_state.connections:
                break
            left.wait(0.01)
        assert not server.server_state.connections


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((name, True) for name in ("127.0.0.1", "127.3.2.1", "::1", "localhost")),
        *((name, False) for name in ("0.0.0.0", "10.0.0.1", "example.com", "")),
    ],
)
def test_what_listens_for_this_machine_alone_is_local(host, local):
    assert is_local(host) is local


def answer_to(host, names):
    """Return the status of a request under a name."""

    async def ask():
        transport = httpx.ASGITransport(KnownNames(APP, names))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.get("/", headers={"host": host})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "weft.example."]
)
def test_a_server_of_this_machine_is_asked_under_its_names(host):
    assert answer_to(host, known_names("127.0.0.1", ["weft.example"])).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil", "", "[::2]", "a:b:c"]
)
def test_a_page_whose_name_was_pointed_at_this_machine_is_not_answered(host):
    answer = answer_to(host, known_names("127.0.0.1", ["weft.example"]))
    assert answer.status_code == 421
    assert "--allowed-host" in answer.json()["error"]["message"]


def test_a_server_that_others_reach_is_asked_under_any_name_or_those_that_are_allowed():
    assert answer_to("any.example", known_names("0.0.0.0")).status_code == 200
    names = known_names("0.0.0.0", ["weft.example", "::5"])
    assert answer_to("weft.example:80", names).status_code == 200
    assert answer_to("[::5]:80", names).status_code == 200
    assert answer_to("localhost", names).status_code == 421
