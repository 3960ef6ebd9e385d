"""The shipped Caddyfile in a real Caddy: a site reaches its ten calls, nobody anything else."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import socketserver
import ssl
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))
ROOT = Path(__file__).resolve().parents[2]
CADDYFILE = ROOT / "orchestrator" / "deployment" / "Caddyfile"
CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
SIGNED = {
    "Content-Type": "application/protobuf",
    "flwr-public-key": "bm9ib2R5",
    "flwr-signature": "bm90aGluZw==",
    "flwr-timestamp": "2026-01-01T00:00:00+00:00",
}
METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
)


class Answer:
    """What came back: a status (0: the connection was closed), headers, and the body."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


class Door:
    """A TLS client of the proxy that sends exactly the bytes it is given."""

    def __init__(self, port: int, authority: Path) -> None:
        self.port = port
        self.context = ssl.create_default_context(cafile=str(authority))

    def send(self, raw: bytes, name: str = "localhost") -> Answer:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as plain,
            self.context.wrap_socket(plain, server_hostname=name) as secured,
        ):
            secured.sendall(raw)
            method = raw.partition(b" ")[0].decode("latin-1")
            response = http.client.HTTPResponse(secured, method=method)
            try:
                response.begin()
                return Answer(response.status, dict(response.getheaders()), response.read())
            except (http.client.HTTPException, ConnectionError, ssl.SSLError):
                return Answer(0, {}, b"")

    def ask(
        self, method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        lines = {"Host": f"localhost:{self.port}", "Connection": "close"}
        lines |= {"Content-Length": str(len(body))} | (headers or {})
        head = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        return self.send(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)


class Recorder(socketserver.ThreadingTCPServer):
    """Stands where the SuperLink does, and keeps each head and the length of each whole body."""

    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[int] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        recorder = self

        class Answering(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(20)
                with context.wrap_socket(self.request, server_side=True) as secured:
                    recorder.one(secured)

        super().__init__(("127.0.0.1", 0), Answering)

    def one(self, secured: ssl.SSLSocket) -> None:
        stream = secured.makefile("rb")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = stream.readline()
            if not line:
                return
            head += line
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        self.heads.append(head)
        promised = int(length[1]) if length else 0
        if len(stream.read(promised)) < promised:  # the proxy cut it off
            return
        self.bodies.append(promised)
        secured.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")


@pytest.fixture(scope="module")
def recorder(servers: Any) -> Iterator[Recorder]:
    with Recorder(*servers.authority.issue("localhost")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def door(
    servers: Any, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("proxy")
    with servers.proxy(recorder.server_address[1], folder) as port:
        yield Door(port, servers.authority.certificate)


@pytest.fixture
def reached(recorder: Recorder) -> list[bytes]:
    """The heads of the requests that the SuperLink's place got in this test."""
    recorder.heads.clear()
    recorder.bodies.clear()
    return recorder.heads


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_a_site_is_let_through_as_it_is(
    door: Door, reached: list[bytes], call: str
) -> None:
    answer = door.ask("POST", f"/v1/fleet/{call}", SIGNED, b"1234")
    assert (answer.status, answer.body) == (200, b"ok")
    [head] = reached
    assert head.startswith(f"POST /v1/fleet/{call} HTTP/1.1\r\n".encode())
    sent = {k.lower(): v for k, v in SIGNED.items()}
    got = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
    assert {k: got[k] for k in sent} == {k: v.lower() for k, v in sent.items()}


def test_health_is_let_through(door: Door, reached: list[bytes]) -> None:
    assert door.ask("GET", "/health").status == 200
    assert door.ask("HEAD", "/health").status == 200
    assert [head.partition(b" HTTP")[0] for head in reached] == [b"GET /health", b"HEAD /health"]


def test_what_a_client_says_of_itself_or_where_it_comes_from_is_left_out(
    door: Door, reached: list[bytes]
) -> None:
    said = {
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Prefix": "/v1/control",
        "X-HTTP-Method-Override": "DELETE",
        "X-Original-URL": "/v1/control/list-nodes",
        "X-Rewrite-URL": "/v1/control/list-nodes",
        "Forwarded": "for=127.0.0.1",
        "Authorization": "Bearer guess",
        "Cookie": "a=b",
    }
    door.ask("POST", "/v1/fleet/get-run", SIGNED | said)
    [head] = reached
    names = {line.partition(b":")[0].lower().decode() for line in head.split(b"\r\n")[1:]}
    assert {name.lower() for name in said} & names == set()


FLEET = "/v1/fleet/get-run"
TRICKS = {
    "another call": "/v1/fleet/register-node",
    "its opposite": "/v1/fleet/unregister-node",
    "an unknown call": "/v1/fleet/anything",
    "the folder": "/v1/fleet/",
    "the root": "/",
    "a slash at the end": f"{FLEET}/",
    "two slashes": "//v1/fleet/get-run",
    "two slashes within": "/v1//fleet/get-run",
    "a dot": "/v1/./fleet/get-run",
    "up and down again": "/v1/control/../fleet/get-run",
    "up from a call": f"{FLEET}/../../control/list-nodes",
    "dots in hexadecimal": f"{FLEET}/%2e%2e/%2e%2e/control/list-nodes",
    "slashes in hexadecimal": "/v1/fleet%2fget-run",
    "an upper slash in hexadecimal": "/v1%2Fcontrol%2Flist-nodes",
    "twice in hexadecimal": "/v1/fleet/%252e%252e/control/list-nodes",
    "a letter in hexadecimal": "/v1/fleet/get-ru%6e",
    "a backslash": "/v1/fleet\\..\\control\\list-nodes",
    "capitals": "/V1/FLEET/GET-RUN",
    "one capital": "/v1/fleet/Get-run",
    "a query": f"{FLEET}?x=1",
    "an empty query": f"{FLEET}?",
    "a parameter": f"{FLEET};x=1",
    "a fragment": f"{FLEET}#/v1/control/list-nodes",
    "a null": f"{FLEET}%00",
    "a new line": f"{FLEET}%0d%0aX: y",
    "a tab": f"{FLEET}%09",
    "an overlong slash": "/v1%c0%affleet/get-run",
    "health with more": "/health/../v1/control/list-nodes",
    "health with a query": "/health?x",
    "an asterisk": "*",
    "no slash": "v1/fleet/get-run",
}


@pytest.mark.parametrize("target", TRICKS.values(), ids=TRICKS)
def test_another_spelling_of_a_path_is_refused(
    door: Door, reached: list[bytes], target: str
) -> None:
    for method in ("POST", "GET"):
        assert door.ask(method, target, SIGNED).status in (0, 400, 404)
    assert reached == []


@pytest.mark.parametrize("method", [m for m in METHODS if m != "POST"])
def test_another_method_is_refused(door: Door, reached: list[bytes], method: str) -> None:
    answer = door.ask(method, FLEET, SIGNED | {"X-HTTP-Method-Override": "POST"})
    assert answer.status in (0, 400, 404)
    assert reached == []


@pytest.mark.parametrize("missing", SIGNED)
def test_a_call_without_a_signature_or_of_another_kind_is_refused(
    door: Door, reached: list[bytes], missing: str
) -> None:
    left = {k: v for k, v in SIGNED.items() if k != missing}
    assert door.ask("POST", FLEET, left).status == 404
    assert reached == []


def smuggled(first: str) -> bytes:
    """Return a request whose rest another server might take for a second one."""
    head = "".join(f"{k}: {v}\r\n" for k, v in SIGNED.items())
    second = "POST /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return f"POST {FLEET} HTTP/1.1\r\nHost: localhost\r\n{head}{first}{second}".encode()


SMUGGLING = {
    "two lengths": "Content-Length: 0\r\nContent-Length: 55\r\n\r\n",
    "length and chunks": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks under another name": "Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n",
    "chunks twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a blank before the colon": "Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n",
    "a signed length": "Content-Length: +0\r\n\r\n",
    "a folded line": "X-A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
    "pipelining": "Content-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("shape", SMUGGLING.values(), ids=SMUGGLING)
def test_no_second_request_is_smuggled_in(door: Door, reached: list[bytes], shape: str) -> None:
    door.send(smuggled(shape))
    assert [head for head in reached if b"control" in head] == []


def test_old_and_foreign_shapes_of_requests_reach_no_control(
    door: Door, reached: list[bytes]
) -> None:
    for first in (
        "GET /v1/control/list-nodes\r\n",
        "POST /v1/control/list-nodes HTTP/1.0\r\n\r\n",
        "POST /v1/control/list-nodes HTTP/1.0\r\nHost: localhost\r\n\r\n",
        "POST https://localhost/v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST https://localhost/v1/control/list-nodes HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
        "CONNECT 127.0.0.1:9092 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        assert door.send(first.encode()).status in (0, 400, 404, 405, 505), first
    assert reached == []


def test_another_host_and_a_request_without_one_are_refused(
    door: Door, reached: list[bytes]
) -> None:
    for host in ("elsewhere", "127.0.0.1", "localhost.elsewhere", ""):
        answer = door.ask("POST", FLEET, SIGNED | {"Host": host})
        assert answer.status in (0, 400), host
    assert reached == []


def test_another_name_has_no_certificate(door: Door, reached: list[bytes]) -> None:
    with pytest.raises(ssl.SSLError):
        door.send(b"GET /health HTTP/1.1\r\nHost: elsewhere\r\n\r\n", name="elsewhere")
    assert reached == []


def test_plain_http_is_refused(door: Door, reached: list[bytes]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)
    connection.request("GET", "/health", headers={"Host": "localhost"})
    assert connection.getresponse().status == 400
    connection.close()
    assert reached == []


def test_a_chunk_of_an_adapter_passes_and_a_body_without_end_does_not(
    door: Door, reached: list[bytes], recorder: Recorder
) -> None:
    chunk = os.urandom(5 << 20) + b" with what Flower writes around it"
    answer = door.ask("POST", "/v1/fleet/push-object", SIGNED, chunk)
    assert (answer.status, recorder.bodies) == (200, [len(chunk)])
    answer = door.ask("POST", "/v1/fleet/push-object", SIGNED, bytes(17 << 20))
    assert answer.status in (0, 413)
    assert recorder.bodies == [len(chunk)]


def test_a_head_without_end_is_refused(door: Door, reached: list[bytes]) -> None:
    assert door.ask("POST", FLEET, SIGNED | {"X-Long": "x" * 40_000}).status in (0, 431)
    assert reached == []


def test_no_signature_is_logged(servers: Any, recorder: Recorder, tmp_path: Path) -> None:
    with servers.proxy(recorder.server_address[1], tmp_path) as port:
        Door(port, servers.authority.certificate).ask("POST", FLEET, SIGNED)
        # nobody is there: what goes wrong is logged by another logger
    with servers.proxy(1, tmp_path, "localhost 127.0.0.1") as port:
        answer = Door(port, servers.authority.certificate).ask("POST", FLEET, SIGNED)
        assert answer.status == 502
    log = (tmp_path / "caddy.log").read_text()
    assert FLEET in log
    assert SIGNED["flwr-signature"] not in log


# --- before a real SuperLink -------------------------------------------------------------------


@pytest.fixture(scope="module")
def exposed(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Door]]:
    """The proxy, and the SuperLink behind it."""
    folder = tmp_path_factory.mktemp("exposed")
    with ExitStack() as stack:
        superlink = stack.enter_context(servers.superlink(folder))
        proxy = stack.enter_context(servers.proxy(superlink, folder))
        certificate = servers.authority.certificate
        yield Door(proxy, certificate), Door(superlink, certificate)


@pytest.mark.slow
def test_no_interface_but_the_sites_is_answered_through_the_proxy(
    exposed: tuple[Door, Door],
) -> None:
    proxy, superlink = exposed
    found = json.loads(superlink.ask("GET", "/openapi.json").body)["paths"]
    routes = [(method.upper(), path) for path, methods in found.items() for method in methods]
    kinds = {path.split("/")[2] for _, path in routes if path.startswith("/v1/")}
    assert {"control", "runtime", "fleet"} <= kinds
    served = ["/docs", "/openapi.json"]
    assert all(superlink.ask("GET", path).status == 200 for path in served)
    routes += [("GET", path) for path in (*served, "/docs/oauth2-redirect", "/redoc", "/")]
    open_to_sites = {("POST", f"/v1/fleet/{call}") for call in CALLS}
    open_to_sites |= {("GET", "/health"), ("HEAD", "/health")}
    assert open_to_sites <= set(routes)
    for method, path in routes:
        for headers in ({}, {"Content-Type": "application/protobuf"}, SIGNED):
            answer = proxy.ask(method, path, headers)
            if path == "/health":
                assert (answer.status, answer.body) == (200, b"")
            elif (method, path) in open_to_sites and headers is SIGNED:
                assert (answer.status, path) == (401, path)
            else:
                assert (answer.status, path) == (404, path)
                assert answer.body in (b"weft: nothing is here", b"")
                assert "server" not in {
                    k.lower() for k, v in answer.headers.items() if v != "Caddy"
                }


def test_the_calls_that_are_let_through_are_all_that_a_registered_site_makes() -> None:
    import flwr.supernode.fleet_http_client as client

    made = set(re.findall(r'"/v1/fleet/([a-z-]+)"', Path(client.__file__).read_text()))
    # with node keys, the SuperLink refuses these two to sites: an administrator registers
    assert made - {"register-node", "unregister-node"} == set(CALLS)


@pytest.mark.slow
def test_a_registered_site_gets_online_through_the_proxy(servers: Any, tmp_path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", "site"],
        cwd=tmp_path,
        check=True,
    )
    with ExitStack() as stack:
        superlink = stack.enter_context(servers.superlink(tmp_path))
        proxy = stack.enter_context(servers.proxy(superlink, tmp_path))
        admin = servers.admin(superlink, tmp_path)
        admin("register", tmp_path / "site.pub", "test", "--name", "site")
        stack.enter_context(servers.supernode(f"localhost:{proxy}", tmp_path / "site", tmp_path))
        servers.until(lambda: '"online"' in admin("list", "test", "--format", "json"))


# --- the file ----------------------------------------------------------------------------------


def caddy(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / "caddy", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("tls", ["files", "admin@example.org"])
def test_caddy_finds_the_file_valid_and_well_formatted(
    servers: Any, tls: str, tmp_path: Path
) -> None:
    if tls == "files":
        tls = " ".join(map(str, servers.authority.issue("weft.example.org")))
    done = caddy(
        *("validate", "--config", CADDYFILE, "--adapter", "caddyfile"),
        WEFT_PROXY_NAME="weft.example.org",
        WEFT_PROXY_TLS=tls,
        WEFT_SUPERLINK="127.0.0.1:9092",
        WEFT_SUPERLINK_CA=str(servers.authority.certificate),
        XDG_DATA_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "Valid configuration" in done.stdout + done.stderr
    assert caddy("fmt", CADDYFILE).stdout == CADDYFILE.read_text("utf-8")
