"""What weft doctor says of Flower's and Ray's programs, by how real processes were started."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from clients.node import running
from orchestrator.deployment import programs
from orchestrator.deployment.reaching import Front

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
SOUND = ("--isolation", "process", "--superexec-auth-secret-file", "secret")
LINK = (*SOUND, "--enable-supernode-auth", "--database", "state.db")
LISTENING = """
import socket, sys
server = socket.create_server((sys.argv.pop(), 0))
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def started(folder, name, words, environment, address="127.0.0.1"):
    """A process of this name and command line, which listens and does nothing else."""
    script = folder / name
    script.write_text(LISTENING)
    secret = folder / "secret"
    secret.touch(0o600)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))}
    with subprocess.Popen(
        [sys.executable, str(script), *words, address],
        env=inherited | environment,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield [one for one in programs.running(name) if one.pid == process.pid]
        process.stdin.close()


def found(look, there):
    return {(one.verdict, one.check): one.says for one in look(there)}


def test_a_sound_superlink_is_found_so(tmp_path):
    with started(tmp_path, "flower-superlink", LINK, QUIET) as there:
        says = found(programs.flower, there)
    assert set(says) == {("ok", "flower"), ("ok", "secrets")}


@pytest.mark.parametrize(
    ("words", "environment", "verdict", "text"),
    [
        (LINK[2:], QUIET, "fail", "gives its tasks to whoever asks"),
        ([*LINK[:2], *LINK[4:]], QUIET, "fail", "gives its tasks to whoever asks"),
        ([*LINK, "--insecure"], QUIET, "fail", "speaks without TLS"),
        ([*SOUND, *LINK[5:]], QUIET, "fail", "lets every node in"),
        (LINK[:5], QUIET, "warn", "keeps what it knows in memory"),
        (LINK, {**QUIET, "FLWR_TELEMETRY_ENABLED": "1"}, "warn", "tells its maker"),
        (LINK, {**QUIET, "FLWR_DISABLE_UPDATE_CHECK": ""}, "warn", "asks its maker"),
        (LINK, dict([*QUIET.items()][:2]), "warn", "installs what an app asks for"),
    ],
)
def test_an_unsound_superlink_is_found_out(tmp_path, words, environment, verdict, text):
    with started(tmp_path, "flower-superlink", words, environment) as there:
        wrong = [f for f in programs.flower(there) if f.verdict != "ok"]
    assert [(f.verdict, text in f.says) for f in wrong] == [(verdict, True)]
    assert wrong[0].do


def test_a_supernode_needs_no_switch_for_what_it_does_not_do(tmp_path):
    environment = dict([*QUIET.items()][:2])
    with started(tmp_path, "flower-supernode", SOUND, environment) as there:
        assert {one.verdict for one in programs.flower(there)} == {"ok"}


def test_the_supernode_that_a_node_starts_is_one():
    with subprocess.Popen(running._program(), stderr=subprocess.DEVNULL) as process:
        there = programs.running("flower-supernode")
        process.kill()
    assert process.pid in [one.pid for one in there]


def test_a_superlink_on_every_network_is_found_out(tmp_path, monkeypatch):
    class Address:
        def __init__(self, address):
            self.address = address

    for own, verdict in (("10.0.0.7", "warn"), ("8.8.8.8", "fail"), ("fe80::1%eth0", "warn")):
        interfaces = {"eth0": [Address(own), Address("00:11:22:33:44:55"), Address("127.0.0.1")]}
        monkeypatch.setattr(programs.psutil, "net_if_addrs", lambda i=interfaces: i)
        with started(tmp_path, "flower-superlink", LINK, QUIET, "0.0.0.0") as there:
            says = found(programs.flower, there)
        assert "listens on 0.0.0.0" in says[verdict, "ports"]
        assert ("8.8.8.8 to the world" in says[verdict, "ports"]) == (verdict == "fail")


def test_a_secret_on_the_command_line_s_path_is_looked_at(tmp_path):
    with started(tmp_path, "flower-superlink", LINK, QUIET) as there:
        (tmp_path / "secret").chmod(0o644)
        says = found(programs.flower, there)
    assert str(tmp_path / "secret") in says["fail", "secrets"]


def test_what_neither_listens_nor_dials_where_the_deployment_is_is_another_s(tmp_path):
    dialing = (*SOUND, "--superlink", "weft.example.org:8443")
    here, there = Front("weft.example.org:8443"), Front("localhost:9")
    with started(tmp_path, "flower-supernode", dialing, QUIET) as nodes:
        assert programs.of_deployment(nodes, [there, here]) == nodes
        assert programs.of_deployment(nodes, [there]) == []
        assert programs.of_deployment(nodes, []) == nodes
    with started(tmp_path, "flower-superlink", LINK, QUIET) as links:
        (port,) = links[0].ports
        assert programs.of_deployment(links, [Front(f"localhost:{port}")]) == links
        assert programs.of_deployment(links, [there]) == []
    theirs = programs.Program("flower-superlink", 1, (), None, tmp_path, frozenset())
    assert programs.of_deployment([theirs], [there]) == [theirs]


def test_a_ray_head_without_a_token_is_found_out(tmp_path):
    with started(tmp_path, "gcs_server", [], {"RAY_AUTH_MODE": "token"}) as there:
        assert set(found(programs.ray, there)) == {("ok", "ray")}
    with started(tmp_path, "gcs_server", [], {}) as there:
        says = found(programs.ray, there)
    assert "asks nobody for a token" in says["warn", "ray"]


def test_somebody_else_s_program_is_told_of(tmp_path):
    theirs = programs.Program("flower-superlink", 1, (), None, tmp_path, frozenset())
    for look in (programs.flower, programs.ray):
        assert "another user's" in next(iter(found(look, [theirs]).values()))
