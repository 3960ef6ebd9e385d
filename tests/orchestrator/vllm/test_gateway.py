"""A gateway leads each request to one adapter from its first byte to its last."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from orchestrator import service
from orchestrator.gateway import Gateway, Keys, Limits, Upstream
from orchestrator.gateway_client import RemoteGateway
from orchestrator.gateway_server import Place, serve
from orchestrator.key_files import BadKey, NoKeys, read_keys
from orchestrator.rollout import Rollout
from orchestrator.routes import BadState, NoRoute, Routes
from orchestrator.vllm import Vllm

POINTER = "bot@production"
ONE, TWO = f"{POINTER}:1111", f"{POINTER}:2222"


@pytest.fixture
def routes(tmp_path):
    found = Routes([POINTER, "bot@canary"], tmp_path / "routes.json")
    found.flip(POINTER, ONE)
    return found


def front(routes, app, **changes):
    """Return a gateway in front of an application."""
    key = changes.pop("key", None)
    return Gateway(routes, Upstream("http://vllm", key, httpx.ASGITransport(app)), **changes)


def ask(gateway, method, path, **options):
    """Ask a gateway without a socket."""

    async def asked():
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


def complete(gateway, model="bot", **options):
    return ask(gateway, "POST", "/v1/completions", json={"model": model, "prompt": "a"}, **options)


def error(answer):
    body = answer.json()["error"]
    assert body["code"] == answer.status_code
    return body["message"]


@pytest.mark.parametrize("model", ["bot", POINTER])
def test_a_request_for_a_name_goes_to_its_adapter(routes, fake, model):
    server = fake(key="secret")
    server.adapters[ONE] = "/one"
    answer = complete(front(routes, server.app, key="secret"), model)
    assert (answer.status_code, answer.json()["model"]) == (200, ONE)
    assert answer.headers["x-weft-model"] == ONE


def test_the_body_goes_on_as_it_is_but_for_the_model(routes):
    seen = {}

    async def echo(request):
        seen.update(json.loads(await request.body()), headers=dict(request.headers))
        return JSONResponse({"ok": True}, 418, {"x-request-id": "7", "set-cookie": "a=b"})

    gateway = front(
        routes, Starlette(routes=[Route("/v1/chat/completions", echo, methods=["POST"])])
    )
    body = {"model": "bot", "messages": [{"role": "user", "content": "ß"}], "n": 1.5, "x": None}
    headers = {"authorization": "Bearer own", "cookie": "c=d", "x-request-id": "7"}
    answer = ask(gateway, "POST", "/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 418
    assert answer.headers["x-request-id"] == "7"
    assert "set-cookie" not in answer.headers
    sent = seen.pop("headers")
    assert seen == {**body, "model": ONE}
    assert "authorization" not in sent
    assert "cookie" not in sent


@pytest.mark.parametrize("model", ["other", f"{POINTER}:1111", "", "the/base"])
def test_a_name_that_is_not_followed_is_unknown(routes, fake, model):
    answer = complete(front(routes, fake().app), model)
    assert answer.status_code == 404
    assert error(answer) == (
        f"no model is called {model!r} here; there are: bot, {POINTER}, bot@canary"
    )


def test_an_alias_without_a_rollout_is_not_ready(routes, fake):
    gateway = front(routes, fake().app)
    answer = complete(gateway, "bot@canary")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert error(answer) == "nothing is deployed for bot@canary yet"
    assert ask(gateway, "GET", "/readyz").status_code == 503
    routes.flip("bot@canary", "bot@canary:3")
    assert ask(gateway, "GET", "/readyz").status_code == 200


def test_an_adapter_that_the_server_lost_is_told_as_such(routes, fake):
    answer = complete(front(routes, fake().app))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert error(answer) == "bot is not loaded at the server just now; try again"


BAD = {
    "no JSON": (b"{", "the request is not JSON"),
    "nested too deep": (b"[" * 100_000, "the request is not JSON"),
    "a list": (b"[]", "the request must be a JSON object, got list"),
    "no model": (b"{}", "model must be a text, got None"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_request_that_is_none_is_refused(routes, fake, case):
    body, message = case
    answer = ask(front(routes, fake().app), "POST", "/v1/completions", content=body)
    assert (answer.status_code, error(answer)) == (400, message)


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics/x", "/v1/tokenize"]
)
def test_only_what_answers_with_a_model_is_passed_on(routes, fake, path):
    server = fake()
    answer = ask(front(routes, server.app), "POST", path, json={"lora_name": "x"})
    assert (answer.status_code, error(answer)) == (404, f"there is no POST {path} here")
    assert server.asked == []


def test_a_body_above_the_limit_is_not_read_to_its_end(routes, fake):
    read = []

    async def parts():
        for number in range(100):
            read.append(number)
            yield b"x" * 100

    gateway = front(routes, fake().app, limits=Limits(body_bytes=450))
    answer = ask(gateway, "POST", "/v1/completions", content=parts())
    assert (answer.status_code, len(read)) == (413, 5)


def test_a_body_that_is_still_being_sent_has_its_place(routes, fake):
    server = fake()
    server.adapters[ONE] = "/one"
    gateway = front(routes, server.app, limits=Limits(in_flight=1))

    async def asked():
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            found = []

            async def slow():
                yield b'{"model": '
                found.append(await client.post("/v1/completions", json={"model": "bot"}))
                yield b'"bot"}'

            found.append(await client.post("/v1/completions", content=slow()))
            found.append(await client.post("/v1/completions", json={"model": "bot"}))
            return [answer.status_code for answer in found]

    assert asyncio.run(asked()) == [429, 200, 200]


@pytest.mark.parametrize("host", ["x/v1/unload_lora_adapter?", "x/v1/unload_lora_adapter#"])
def test_the_path_at_the_server_is_no_matter_of_the_host_header(routes, fake, host):
    server = fake()
    server.adapters[ONE] = "/one"
    answer = complete(front(routes, server.app), headers={"host": host})
    assert answer.status_code == 200
    assert server.asked == []


def test_headers_that_are_not_ascii_go_on_as_they_are(routes):
    seen = {}

    async def echo(request):
        seen.update(request.scope["headers"])
        return JSONResponse({}, 429, {"retry-after": "7"})

    app = Starlette(routes=[Route("/v1/completions", echo, methods=["POST"])])
    answer = complete(front(routes, app), headers={"user-agent": b"caf\xe9"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert seen[b"user-agent"] == b"caf\xe9"


def test_keys_are_asked_for_and_never_passed_on(routes, fake):
    server = fake()
    server.adapters[ONE] = "/one"
    gateway = front(routes, server.app, keys=Keys(["one", "two"]))
    assert complete(gateway).status_code == 401
    assert complete(gateway, headers={"authorization": "Bearer no"}).status_code == 401
    assert ask(gateway, "GET", "/v1/models").status_code == 401
    assert complete(gateway, headers={"authorization": "Bearer two"}).status_code == 200
    assert ask(gateway, "GET", "/healthz").json() == {"status": "ok"}


def test_routes_are_switched_with_the_administrators_key_alone(routes, fake):
    shut = front(routes, fake().app, keys=Keys(["one"]))
    message = {"model": TWO}
    answer = ask(shut, "PUT", f"/weft/routes/{POINTER}", json=message)
    assert answer.status_code == 403
    gateway = front(routes, fake().app, keys=Keys(["one"]), admin=Keys(["root"]))
    for key, status in (("one", 401), ("root", 200)):
        headers = {"authorization": f"Bearer {key}"}
        answer = ask(gateway, "PUT", f"/weft/routes/{POINTER}", json=message, headers=headers)
        assert answer.status_code == status
    assert routes.models() == {POINTER: TWO}
    for pointer, model in (("bot@canary", TWO), (POINTER, None), ("other@x", "other@x:1")):
        bad = {"json": {"model": model}, "headers": headers}
        answer = ask(gateway, "PUT", f"/weft/routes/{pointer}", **bad)
        assert answer.status_code in (400, 404)
    assert routes.models() == {POINTER: TWO}


def test_what_may_be_asked_for_is_listed(routes, fake):
    rows = ask(front(routes, fake().app), "GET", "/v1/models").json()["data"]
    assert [(row["id"], row["root"]) for row in rows] == [("bot", ONE), (POINTER, ONE)]


def test_prometheus_is_told_of_requests_and_routes(routes, fake):
    server = fake()
    server.adapters[ONE] = "/one"
    gateway = front(routes, server.app)
    complete(gateway)
    complete(gateway, "other")
    text = ask(gateway, "GET", "/metrics").text
    assert f'weft_gateway_requests_total{{alias="{POINTER}",status="200"}} 1.0' in text
    assert 'weft_gateway_requests_total{alias="",status="404"} 1.0' in text
    assert f'weft_gateway_route{{alias="{POINTER}",model="{ONE}"}} 1.0' in text


def test_a_server_that_is_not_there_is_a_bad_gateway(routes):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    answer = complete(Gateway(routes, Upstream(url)))
    assert (answer.status_code, error(answer)) == (502, "the server cannot be reached")
    assert routes.flights() == {}


def test_a_server_that_does_not_answer_in_time_is_a_gateway_timeout(routes):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer = complete(Gateway(routes, Upstream(url), Limits(read_s=0.05)))
    assert (answer.status_code, error(answer)) == (504, "the server did not answer in time")


def test_routes_are_there_again_after_a_restart(routes, tmp_path):
    assert Routes([POINTER], tmp_path / "routes.json").models() == {POINTER: ONE}
    assert Routes(["bot@canary"], tmp_path / "routes.json").models() == {}
    with pytest.raises(NoRoute, match="start the gateway with --follow other@x"):
        routes.flip("other@x", "other@x:1")


@pytest.mark.parametrize("text", ["{", "[]", '{"bot@production": 3}', '{"bot@production": "x:1"}'])
def test_a_file_that_holds_no_routes_is_refused(tmp_path, text):
    (tmp_path / "routes.json").write_text(text)
    with pytest.raises(BadState, match=r"routes\.json holds no routes of a gateway"):
        Routes([POINTER], tmp_path / "routes.json")


def test_a_route_that_was_dropped_leads_nowhere_and_stays_dropped(routes, fake, tmp_path):
    gateway = front(routes, fake().app, admin=Keys(["root"]))
    path = f"/weft/routes/{POINTER}"
    assert ask(gateway, "DELETE", path).status_code == 401
    assert routes.leads(POINTER) == ONE
    admin = {"authorization": "Bearer root"}
    assert ask(gateway, "DELETE", path, headers=admin).status_code == 200
    assert complete(gateway).status_code == 503
    assert Routes([POINTER], tmp_path / "routes.json").leads(POINTER) is None


def test_a_request_that_has_its_model_keeps_it(routes):
    with routes.taken("bot") as first:
        routes.flip(POINTER, TWO)
        with routes.taken("bot") as second:
            assert (first, second) == (ONE, TWO)
            assert (routes.in_flight(ONE), routes.in_flight(TWO)) == (1, 1)
    assert routes.flights() == {}


def test_a_file_of_keys_without_a_key_is_refused(tmp_path):
    assert read_keys(None) == []
    (tmp_path / "keys").write_text("\n one \n\ntwo\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(NoKeys, match="holds no key"):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize("key", [b"se cret", b"s\xc3\xa9cret", b"s\xffcret", b"s\x00cret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(tmp_path, key):
    (tmp_path / "keys").write_bytes(key + b"\n")
    with pytest.raises(BadKey, match="other than printable ASCII") as refused:
        read_keys(tmp_path / "keys")
    assert "cret" not in str(refused.value)


# --- on sockets -------------------------------------------------------------------------------


@contextmanager
def streaming(url, model="bot"):
    body = {"model": model, "prompt": "a", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        yield answer, answer.iter_raw()


class Held:
    """A server that streams a part, and the rest when it is told to."""

    def __init__(self):
        self.loop, self.go, self.ended = None, asyncio.Event(), threading.Event()
        self.app = Starlette(routes=[Route("/v1/completions", self.answer, methods=["POST"])])

    async def answer(self, request):
        self.loop = asyncio.get_running_loop()
        model = (await request.json())["model"]
        return StreamingResponse(self.parts(model), media_type="text/event-stream")

    async def parts(self, model):
        try:
            yield f"data: {model}\n\n".encode()
            await self.go.wait()
            yield b"data: [DONE]\n\n"
        finally:
            self.ended.set()

    def release(self):
        self.loop.call_soon_threadsafe(self.go.set)


def test_a_stream_comes_part_by_part_and_ends_on_the_adapter_it_began_with(routes, listening):
    held = Held()
    url = listening(Gateway(routes, Upstream(listening(held.app))).app)
    with streaming(url) as (answer, parts):
        assert next(parts) == f"data: {ONE}\n\n".encode()
        assert answer.headers["content-type"].startswith("text/event-stream")
        routes.flip(POINTER, TWO)
        assert routes.in_flight(ONE) == 1
        held.release()
        assert b"".join(parts) == b"data: [DONE]\n\n"
    with streaming(url) as (_, parts):
        assert next(parts) == f"data: {TWO}\n\n".encode()


def test_a_server_may_close_every_connection_after_its_answer(routes):
    said = b'{"model": "x"}'

    def answer_once_each(bound):
        for _ in range(2):
            try:
                taken, _ = bound.accept()
            except TimeoutError:  # the second request came on the first connection
                return
            with taken, taken.makefile("rb") as lines:
                size = 0
                for line in iter(lines.readline, b"\r\n"):
                    name, _, value = line.lower().partition(b":")
                    size = int(value) if name == b"content-length" else size
                lines.read(size)
                taken.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
                taken.settimeout(5.0)
                taken.recv(1)  # the gateway's end of the connection, and no second request

    with socket.create_server(("127.0.0.1", 0)) as bound:
        bound.settimeout(5.0)
        thread = threading.Thread(target=answer_once_each, args=(bound,))
        thread.start()
        gateway = Gateway(routes, Upstream(f"http://127.0.0.1:{bound.getsockname()[1]}"))

        async def both():
            transport = httpx.ASGITransport(gateway.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                body = {"model": "bot"}
                return [await client.post("/v1/completions", json=body) for _ in range(2)]

        answers = asyncio.run(both())
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_client_that_leaves_ends_its_request_at_the_server(routes, listening):
    held = Held()
    url = listening(Gateway(routes, Upstream(listening(held.app))).app)
    with streaming(url) as (_, parts):
        next(parts)
    assert held.ended.wait(20)


def test_more_requests_than_allowed_are_told_to_come_again(routes, listening):
    held = Held()
    gateway = Gateway(routes, Upstream(listening(held.app)), Limits(in_flight=1))
    url = listening(gateway.app)
    with streaming(url) as (_, parts):
        next(parts)
        answer = httpx.post(f"{url}/v1/completions", json={"model": "bot"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        held.release()
        list(parts)


def test_an_answer_that_the_server_breaks_off_is_no_whole_answer(routes, listening):
    async def broken(request):
        async def parts():
            yield b"data: a\n\n"
            raise ConnectionResetError

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/v1/completions", broken, methods=["POST"])])
    url = listening(Gateway(routes, Upstream(listening(app))).app)
    with streaming(url) as (_, parts), pytest.raises(httpx.RemoteProtocolError):
        list(parts)
    assert routes.flights() == {}


class Following:
    """Follows until it is told to stop."""

    def __init__(self):
        self.ended = False

    def run(self, stop):
        self.ended = stop.wait(60)


def test_sigterm_under_load_ends_no_request_before_its_end(routes, listening):
    held, following, again, found = Held(), Following(), [], []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gateway = Gateway(routes, Upstream(listening(held.app)))

    def load(begun):
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
            body = {"model": "bot", "stream": True}
            url = f"http://127.0.0.1:{port}/v1/completions"
            with client.stream("POST", url, json=body, timeout=30) as answer:
                parts = answer.iter_raw()
                first = next(parts)
                begun.wait()
                found.append(first + b"".join(parts))

    def told():
        begun.wait()
        signal.raise_signal(signal.SIGTERM)
        while True:  # until it takes no more connections: then it has been told
            try:
                socket.create_connection(("127.0.0.1", port), 10).close()
            except OSError:
                break
        held.release()

    begun = threading.Barrier(5, timeout=60)
    threads = [threading.Thread(target=load, args=(begun,)) for _ in range(4)]
    threads.append(threading.Thread(target=told))
    before = signal.signal(signal.SIGTERM, lambda *_: again.append(True))
    for one in threads:
        one.start()
    try:
        serve(gateway, following, Place("127.0.0.1", port))
        for one in threads:
            one.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [f"data: {ONE}\n\ndata: [DONE]\n\n".encode()] * 4
    assert following.ended
    assert again == []


def test_ten_promotions_and_rollbacks_lose_no_request_and_ask_no_unloaded_adapter(
    bot, fake, place, listening, tmp_path
):
    server = fake()
    rollout = place(server)
    routes = Routes([POINTER], tmp_path / "live.json")
    behind = listening(server.app)
    url = listening(Gateway(routes, Upstream(behind), admin=Keys(["root"])).app)
    live = Rollout(bot, rollout.deployment, Vllm(behind), [RemoteGateway(url, "root")])
    ends = (live.vllm, *live.switches)
    allowed = {live.run().model}
    stop, found = threading.Event(), []

    def load():
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                before = set(allowed)
                body = {"model": "bot", "prompt": "a", "stream": len(found) % 2 == 0}
                answer = client.post(f"{url}/v1/completions", json=body)
                model = answer.headers.get("x-weft-model")
                found.append((answer.status_code, model in before | allowed, model in answer.text))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            if number % 2:
                service.rollback(bot, POINTER)
            else:
                service.promote(bot, "bot", "production", "bot:v2")
            target = live.deployment.model_of(bot.store.resolve(POINTER))
            allowed.add(target)
            done = live.run()
            assert (done.model, done.left, len(done.unloaded)) == (target, (), 1)
            allowed.intersection_update({target})
    finally:
        stop.set()
        for one in threads:
            one.join()
        for one in ends:
            one.close()
    assert len(found) > 20
    assert set(found) == {(200, True, True)}
    assert server.wrongs == []
    assert list(server.adapters) == [done.model]
