"""weft doctor, at a coordinator and at a site, of deployments that are sound and that are not."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.deployment.findings import Finding
from orchestrator.deployment.keeping import blobs, database
from orchestrator.deployment.reaching import (
    BadAddress,
    Front,
    answers,
    interfaces,
    reached,
    refuses,
)
from storage.database import open_database


class Answering(BaseHTTPRequestHandler):
    """Answers /health, and whatever else the server was told to."""

    server: Any

    def do_GET(self) -> None:
        self.send_response_only(self.server.statuses.get(self.path, 404))
        self.send_header("Date", formatdate(time.time() + self.server.ahead_s, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *words: Any) -> None:
        pass


@contextmanager
def answering(
    certificate: tuple[Path, Path] | None,
    ahead_s: float = 0.0,
    statuses: Mapping[str, int] | None = None,
) -> Iterator[int]:
    """Run a server that answers so; yields its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.ahead_s = ahead_s  # type: ignore[attr-defined]
        server.statuses = {"/health": 200} if statuses is None else statuses  # type: ignore[attr-defined]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def only(findings: Iterator[Finding]) -> Finding:
    [finding] = findings
    return finding


@pytest.mark.parametrize(
    ("names", "days", "verdict", "text"),
    [
        (["localhost"], 300, "ok", "days more"),
        (["localhost"], 10, "warn", "is good for 9 days more"),
        (["localhost"], -2, "fail", "certificate has expired"),
        (["elsewhere.example.org"], 300, "fail", "Hostname mismatch"),
    ],
)
def test_a_certificate_is_looked_at(
    servers: Any, names: list[str], days: float, verdict: str, text: str
) -> None:
    with answering(servers.authority.issue(*names, days=days)) as port:
        finding = only(reached(Front(f"localhost:{port}", servers.authority.certificate)))
    assert (finding.verdict, text in finding.says) == (verdict, True), finding


def test_a_certificate_of_an_unknown_authority_is_found(servers: Any) -> None:
    with answering(servers.authority.issue("localhost")) as port:
        finding = only(reached(Front(f"localhost:{port}")))
    assert finding.verdict == "fail"
    assert "root_certificates" in finding.do


def test_a_server_without_tls_and_nobody_are_told_apart(servers: Any) -> None:
    with answering(None) as port:
        front = Front(f"localhost:{port}", servers.authority.certificate)
        assert "speaks no TLS" in only(reached(front)).says
        assert only(reached(Front(f"localhost:{port}", insecure=True))).verdict == "warn"
    gone = only(reached(front))
    assert (gone.verdict, gone.check) == ("fail", "reachable")
    assert "nobody answers" in gone.says


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "text"),
    [
        (0, "ok", "agree"),
        (-20, "fail", "s ahead of"),
        (-4, "warn", "s ahead of"),
        (60, "warn", "s behind"),
        (400, "fail", "s behind"),
    ],
)
def test_clocks_that_differ_are_found(ahead_s: float, verdict: str, text: str) -> None:
    with answering(None, ahead_s) as port:
        found = list(answers(Front(f"localhost:{port}", insecure=True), "the SuperLink"))
    assert [f.check for f in found] == ["reachable", "clock"]
    assert found[1].verdict == verdict
    assert text in found[1].says


def test_a_proxy_without_a_superlink_is_found() -> None:
    with answering(None, statuses={"/health": 502}) as port:
        finding = only(answers(Front(f"localhost:{port}", insecure=True), "the SuperLink"))
    assert finding.verdict == "fail"
    assert "status 502" in finding.says


def test_each_path_that_is_answered_is_told() -> None:
    open_ones = {"/docs": 200, "/v1/control/list-nodes": 415, "/v1/runtime/acquire-task": 401}
    with answering(None, statuses=open_ones) as port:
        finding = only(refuses(Front(f"localhost:{port}", insecure=True)))
        assert only(refuses(Front(f"localhost:{port}", insecure=True), ["/redoc"])).verdict == "ok"
    assert finding.verdict == "fail"
    for path, status in open_ones.items():
        assert f"{path} ({status})" in finding.says or " more" in finding.says


@pytest.mark.parametrize("address", ["localhost", "https://localhost:443", "a:0", "a:99999", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadAddress, match="write HOST:PORT"):
        Front(address)


def test_a_database_is_looked_at_and_not_made(tmp_path: Path) -> None:
    file = tmp_path / "weft.db"
    url = f"sqlite:///{file}"
    assert only(database(url)).says.endswith("the first command makes it")
    assert not file.exists()
    open_database(url).dispose()
    file.chmod(0o660)
    assert only(database(url)).verdict == "ok"
    file.chmod(0o664)
    assert [f.verdict for f in database(url)] == ["ok", "warn"]
    file.write_bytes(b"no database" * 100)
    assert only(database(url)).verdict == "fail"
    assert only(database("postgresql+psycopg://weft@127.0.0.1:1/weft")).verdict == "fail"
    assert only(database("oracle://x")).verdict == "fail"


def test_an_older_schema_is_found(tmp_path: Path) -> None:
    from storage.database import connect, migrate

    url = f"sqlite:///{tmp_path / 'weft.db'}"
    engine = connect(url)
    migrate(engine, "0009")
    engine.dispose()
    finding = next(database(url))
    assert finding.verdict == "fail"
    assert "weft store upgrade" in finding.do


def test_blobs_are_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_BLOBS", raising=False)
    assert only(blobs(tmp_path)).verdict == "ok"
    assert list((tmp_path / "blobs").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEFT_BLOBS", str(tmp_path / "file" / "blobs"))
    assert only(blobs(tmp_path)).verdict == "fail"


def weft(*words: str | Path, home: Path) -> tuple[int, list[dict[str, str]]]:
    """Run weft doctor; its exit code and findings."""
    done = CliRunner().invoke(
        app, ["doctor", "--json", *map(str, words)], env={"WEFT_HOME": str(home)}
    )
    assert done.stdout, done.output
    return done.exit_code, json.loads(done.stdout)


def told(findings: list[dict[str, str]], verdict: str) -> dict[str, str]:
    return {f["check"]: f["says"] for f in findings if f["verdict"] == verdict}


def site(folder: Path, superlink: str, authority: Path) -> Path:
    """Write a node.yaml, and what it names."""
    (folder / "model").mkdir()
    (folder / "notes.jsonl").write_text('{"text": "a", "label": "b"}\n')
    key = folder / "node.key"
    key.touch(0o600)
    file = folder / "node.yaml"
    document = {
        "name": "clinic-north",
        "superlink": superlink,
        "root_certificates": str(authority),
        "key": "node.key",
        "models": {"0" * 64: "model"},
        "data": {"notes": {"uri": "jsonl:notes.jsonl", "epsilon": 8}},
    }
    file.write_text(yaml.safe_dump(document))
    return file


def test_a_site_is_told_what_is_wrong_with_it(servers: Any, tmp_path: Path) -> None:
    with answering(servers.authority.issue("localhost", days=90)) as port:
        file = site(tmp_path, f"localhost:{port}", servers.authority.certificate)
        code, findings = weft("--node", file, home=tmp_path)
        assert (code, told(findings, "fail")) == (0, {})
        looked_at = {"node.yaml", "models", "data", "secrets", "tls", "clock", "exposure"}
        assert looked_at <= set(told(findings, "ok"))
        (tmp_path / "model").rmdir()
        (tmp_path / "notes.jsonl").unlink()
        (tmp_path / "node.key").unlink()
        code, findings = weft("--node", file, home=tmp_path)
    assert code == 1
    assert set(told(findings, "fail")) == {"key", "models", "data"}
    file.write_text("name: clinic-north\n")
    code, findings = weft("--node", file, home=tmp_path)
    assert code == 1
    assert "node.yaml" in told(findings, "fail")


@pytest.mark.slow
def test_a_deployment_is_looked_at_through_its_proxy_and_without_one(
    servers: Any, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with servers.superlink(tmp_path) as superlink, servers.proxy(superlink, tmp_path) as proxy:
        certificate = servers.authority.certificate
        version, paths = interfaces(Front(f"localhost:{superlink}", certificate))
        assert version.startswith("1.41.")
        assert len(paths) > 40
        ends = ["--superlink", f"localhost:{superlink}", "--superlink-ca", certificate]
        code, findings = weft(
            *ends, "--proxy", f"localhost:{proxy}", "--proxy-ca", certificate, home=home
        )
        assert (code, told(findings, "fail")) == (0, {})
        assert (
            f"refuses {len({*paths, '/docs', '/openapi.json', '/v1/fleet/register-node'})}"
            in (told(findings, "ok")["exposure"])
        )
        # sites dial the SuperLink itself
        code, findings = weft(
            *ends, "--proxy", f"localhost:{superlink}", "--proxy-ca", certificate, home=home
        )
        assert code == 1
        assert "runs code at every site" in told(findings, "fail")["exposure"]
        file = site(tmp_path, f"localhost:{superlink}", certificate)
        code, findings = weft("--node", file, home=home)
        assert code == 1
        assert "exposure" in told(findings, "fail")
