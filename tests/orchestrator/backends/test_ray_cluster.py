"""A Ray cluster is joined only where it asks everybody for a token, and works like a local one."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from orchestrator.backends import ray_cluster
from orchestrator.backends.ray import RayBackend, RayUnavailable

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def no_ray(monkeypatch):
    """Make Ray look not started, and joining it a note of the address."""
    joined = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options["address"]))
    monkeypatch.setattr(ray_cluster, "_lets_in", lambda address: False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return joined


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray-head:6379", "[fd00::1]:6379"])
def test_an_address_elsewhere_is_refused_without_token_authentication(
    no_ray, address, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token may lie
    for environment in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "t" * 32}):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(RayUnavailable, match=r"is not joined.*RAY_AUTH_MODE=token"):
                ray_cluster.join_ray(address)
    assert no_ray == []


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379"])
def test_a_loopback_address_needs_no_token(no_ray, address):
    ray_cluster.join_ray(address)

    assert no_ray == [address]


def test_a_ray_of_our_own_is_started_whatever_cluster_the_environment_names(no_ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # set already, so that nothing is set for good
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray_cluster.start_ray(1)

    assert no_ray == ["local"]


def test_a_token_in_a_file_is_a_token(no_ray, monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("t" * 32)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))

    ray_cluster.join_ray("10.0.0.1:6379")

    assert no_ray == ["10.0.0.1:6379"]


def test_a_cluster_that_takes_a_token_and_asks_nobody_for_one_is_refused(no_ray, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32)
    monkeypatch.setattr(ray_cluster, "_lets_in", lambda address: True)

    with pytest.raises(RayUnavailable, match="lets everybody in"):
        ray_cluster.join_ray("10.0.0.1:6379")

    assert no_ray == []


@pytest.mark.parametrize("address", ["auto", "ray://10.0.0.1:10001", "10.0.0.1", ":6379"])
def test_an_address_is_a_host_and_a_port(no_ray, address):
    with pytest.raises(RayUnavailable, match="must be HOST:PORT"):
        ray_cluster.join_ray(address)


def test_a_cluster_that_is_not_there_is_refused_with_a_way_out(no_ray, monkeypatch):
    def unreachable(**options):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", unreachable)

    with pytest.raises(RayUnavailable, match=r"cluster at 127\.0\.0\.1:6379 cannot be joined"):
        RayBackend(workers=1, address="127.0.0.1:6379")
    with pytest.raises(RayUnavailable, match=r"Ray cannot start .*; backend: inline needs no Ray"):
        RayBackend(workers=1)


@pytest.fixture
def one_ray(monkeypatch):
    """Ray that is only noted to start, be joined and shut down, with room for workers."""
    happened = []

    def end():
        happened.append("shut down")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def begin(what):
        happened.append(what)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", end)
    monkeypatch.setattr(ray_cluster, "start_ray", lambda cpus: begin("started"))
    monkeypatch.setattr(ray_cluster, "join_ray", begin)
    monkeypatch.setattr(ray_cluster, "_current", [])
    return happened


def test_the_last_who_uses_a_ray_ends_it_and_not_who_started_it(one_ray):
    first, second = (ray_cluster.share_ray(None, 1) for _ in range(2))
    first.release()
    third = ray_cluster.share_ray(None, 1)
    second.release()
    assert one_ray == ["started"]
    third.release()
    assert one_ray == ["started", "shut down"]
    ray_cluster.share_ray(None, 1).release()
    assert one_ray == ["started", "shut down"] * 2


def test_a_ray_that_was_there_before_stays(one_ray, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    ray_cluster.share_ray(None, 1).release()
    assert one_ray == []


def test_who_used_a_ray_that_is_gone_does_not_end_the_next(one_ray, monkeypatch):
    old = ray_cluster.share_ray(None, 1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # somebody shut it down
    ray_cluster.share_ray(None, 1)
    old.release()
    assert one_ray == ["started", "started"]


def test_a_process_is_in_one_ray_at_a_time(one_ray):
    here = ray_cluster.share_ray("127.0.0.1:6379", 1)
    for other in (None, "127.0.0.1:6380"):
        with pytest.raises(RayUnavailable, match=r"at 127\.0\.0\.1:6379 until its runs .*another"):
            ray_cluster.share_ray(other, 1)
    here.release()
    ray_cluster.share_ray(None, 1)
    with pytest.raises(RayUnavailable, match=r"a Ray of its own .*at 127\.0\.0\.1:6379"):
        ray_cluster.share_ray("127.0.0.1:6379", 1)


_DRIVER = """
import json, sys, warnings
from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from orchestrator.backends.ray import RayBackend
from strategies.base import Broadcast

backend = RayBackend(workers=2, address=sys.argv[1])
asked = [
    Assignment("train", "run", name, 1, "0" * 64, ModelSpec("none", "causal-lm"),
               PluginChoice("lora"), Broadcast({}), DataSpec("jsonl:/gone.jsonl"),
               PluginChoice("sgd"), sys.argv[2])
    for name in "abc"
]
results = [r for r in backend.run(asked, lambda a: None) if r is not None]
backend.close()
print(json.dumps({r.client: r.reason for r in results}))
"""


@pytest.fixture
def cluster():
    """A head on this machine's network address that asks for a token; its address and the token."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; says which address would
        host = probe.getsockname()[0]
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--node-ip-address={host}", "--include-dashboard=false", "--disable-usage-stats"]
    # A folder of its own: in the usual one, Ray notes this cluster for whoever starts one next.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # pytest's is too long for a socket's name
    command += ["--object-store-memory=100000000", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield f"{host}:{port}", environment
    head.terminate()
    head.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def drive(address, environment, site):
    return subprocess.run(
        [sys.executable, "-c", _DRIVER, address, str(site)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_by_who_has_it_and_by_nobody_else(cluster, tmp_path):
    address, environment = cluster
    ready = [RAY, "health-check", "--address", address]
    while subprocess.run(ready, env=environment, capture_output=True, check=False).returncode:
        pass  # the head is starting; the test's time limit ends this

    joined = drive(address, environment, tmp_path / "site")
    stranger = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
    refused = drive(address, stranger, tmp_path / "site")
    wrong = drive(address, environment | {"RAY_AUTH_TOKEN": "w" * 32}, tmp_path / "site")

    assert joined.returncode == 0, joined.stderr
    reasons = json.loads(joined.stdout.splitlines()[-1])
    assert sorted(reasons) == ["a", "b", "c"]
    assert all("gone.jsonl" in reason for reason in reasons.values())  # each was really begun
    assert "is not joined" in refused.stderr
    assert "cannot be joined" in wrong.stderr
