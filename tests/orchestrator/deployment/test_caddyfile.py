"""The proxy's configuration with a deployment's values in it."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.deployment.proxy import BadProxy, Exposure, caddyfile, shipped

CADDY = Path(sysconfig.get_path("scripts")) / "caddy"


def exposure(**changed):
    given = {
        "names": ("weft.example.org",),
        "tls": ("/etc/weft/site.crt", "/etc/weft/site.key"),
        "superlink": "127.0.0.1:9092",
        "authority": Path("/var/lib/weft/ca.crt"),
    }
    return Exposure(**given | changed)


def test_every_place_has_its_value():
    text = caddyfile(exposure(names=("weft.example.org", "10.0.0.1"), port=8443, bind="10.0.0.1"))
    assert "{$" not in text
    assert "weft.example.org 10.0.0.1 {" in text
    assert "tls /etc/weft/site.crt /etc/weft/site.key" in text
    assert "tls_trust_pool file /var/lib/weft/ca.crt" in text
    assert "https_port 8443" in text
    assert "bind 10.0.0.1" in text


def test_every_value_has_its_place():
    places = set(re.findall(r"\{\$(\w+)", shipped()))
    assert set(exposure().variables()) <= places


def test_caddy_reads_what_is_printed(tmp_path):
    for name in ("a site.crt", "a site.key"):
        (tmp_path / name).touch()
    for given in (
        {"tls": (f"{tmp_path}/a site.crt", f"{tmp_path}/a site.key")},
        {"tls": ("admin@example.org",), "names": ("weft.example.org", "10.0.0.1")},
    ):
        file = tmp_path / "Caddyfile"
        file.write_text(caddyfile(exposure(**given)))
        command = [CADDY, "adapt", "--config", file, "--adapter", "caddyfile"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert all(part in done.stdout for part in given["tls"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": ()}, "the proxy has no name"),
        ({"names": ("weft.example.org {\n respond",)}, "name of the proxy must be a host name"),
        ({"names": ("Weft.example.org",)}, "in lower case"),
        ({"names": ("*.example.org",)}, "a host name"),
        ({"tls": ("nobody",)}, "--acme of the proxy must be an e-mail address, got 'nobody'"),
        ({"superlink": "https://127.0.0.1:9092"}, "--superlink of the proxy must be HOST:PORT"),
        ({"superlink": "127.0.0.1:99999"}, "got '127.0.0.1:99999'"),
        ({"port": 0}, "--port of the proxy must be 1 to 65535, got '0'"),
        ({"bind": "everywhere"}, "--bind of the proxy must be an address"),
    ],
)
def test_a_value_that_would_change_the_file_is_refused(changed, message):
    with pytest.raises(BadProxy, match=re.escape(message)):
        exposure(**changed)


def test_a_path_that_would_end_its_word_is_refused():
    with pytest.raises(BadProxy, match="a path without quotes or braces"):
        caddyfile(exposure(authority=Path('/var/lib/"\n}\nrespond')))


def test_the_command_prints_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEFT_HOME", raising=False)

    def weft(*words):
        return CliRunner().invoke(app, ["proxy", "--name", "weft.example.org", *words])

    done = weft("--certificate", "a.crt", "--key", "a.key")
    assert done.exit_code == 0, done.output
    assert f"tls {tmp_path}/a.crt {tmp_path}/a.key" in done.stdout
    assert f"{tmp_path}/.weft/superlink/tls/ca.crt" in done.stdout
    for words in ((), ("--acme", "a@b.org", "--key", "k"), ("--certificate", "c")):
        with pytest.raises(BadProxy, match="give either"):
            raise weft(*words).exception


def test_the_superlink_is_the_one_that_was_started_last(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_HOME", str(tmp_path))
    (tmp_path / "superlink").mkdir()
    (tmp_path / "superlink" / "address").write_text("127.0.0.1:19092\n")
    words = ["proxy", "--name", "weft.example.org", "--acme", "admin@example.org"]
    printed = CliRunner().invoke(app, words).stdout
    assert "reverse_proxy 127.0.0.1:19092 {" in printed
    assert f"tls_trust_pool file {tmp_path}/superlink/tls/ca.crt" in printed
