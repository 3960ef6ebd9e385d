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

from orchestrator import service
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head on this machine's network address that asks for a token; its address and a member."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; says which address would
        host = probe.getsockname()[0]
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    token = tmp_path_factory.mktemp("cluster") / "token"
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    # A folder of its own: in the usual one, Ray notes this cluster for whoever starts one next.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # pytest's is too long for a socket's name
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    processes = [node(environment, host, *head)]
    address = f"{host}:{port}"
    ready = [RAY, "health-check", "--address", address]
    while subprocess.run(ready, env=environment, capture_output=True, check=False).returncode:
        pass  # the head is starting; the test's time limit ends this
    yield address, environment, processes
    for process in reversed(processes):
        process.terminate()
        process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def node(environment, host, *options):
    """Start a machine of a cluster with one CPU: a raylet of its own."""
    command = [RAY, "start", "--block", "--num-cpus=1", f"--node-ip-address={host}", *options]
    command += ["--disable-usage-stats", "--object-store-memory=100000000"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)


def drive(address, environment, place, program=_DRIVER):
    return subprocess.run(
        [sys.executable, "-c", program, address, str(place)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_by_who_has_it_and_by_nobody_else(cluster, tmp_path):
    address, environment, _ = cluster

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


_RUN = """
import json, os, signal, sys
from pathlib import Path
import ray
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config

address, folder = sys.argv[1], Path(sys.argv[2])

def noted(assignment, stepped):
    if assignment.action != "train":
        return perform(assignment, stepped)
    here = ray.get_runtime_context().get_node_id()
    trained = folder / here
    first, drivers = not trained.exists(), (folder / "driver").read_text() == here
    with trained.open("a") as file:
        file.write(f"{os.getpid()} {assignment.round} {assignment.client}\\n")
    if first:  # each machine waits for the other's first one
        (folder / "meet").open("r" if drivers else "w").close()
    elif not drivers:
        os.kill(os.getppid(), signal.SIGKILL)  # the raylet of the machine that it is on
        signal.pause()
    return perform(assignment, stepped)

options = {"address": address, "perform": noted, "heartbeat_s": 60.0}
before, backend = RayBackend(1, **options), RayBackend(2, **options)
before.close()  # it joined the cluster, and the other one stays there
os.mkfifo(folder / "meet")
(folder / "driver").write_text(ray.get_runtime_context().get_node_id())
workspace = service.open_workspace(folder / "elsewhere")
config = parse_config(json.loads((folder / "config.json").read_text()))
version = service.launch(workspace, config, backend=backend)
backend.close()
events = [e.kind for e in workspace.ledger.events(workspace.ledger.run("task-1").id)]
print(json.dumps({"version": version, "events": events}))
"""
_MEMBERS = """
import sys
from ray._raylet import GcsClient
sys.exit(len(GcsClient(address=sys.argv[1]).get_all_node_info()) < 2)
"""


@pytest.mark.slow
def test_a_run_over_two_machines_goes_on_when_one_of_them_is_lost(
    cluster, workspace, tiny, notes, tmp_path
):
    """Each trains; the raylet of one is killed in mid-assignment, which the other takes over."""
    address, environment, processes = cluster
    processes.append(node(environment, address.partition(":")[0], f"--address={address}"))
    simulate = {"data": notes("rows", size=48), "by": "iid", "parts": 4, "public": True}
    config = tiny(rounds=3, strategy="fedsvd", clients={"simulate": simulate}, retries=0)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    wanted = service.launch(workspace, config)
    members = [sys.executable, "-c", _MEMBERS, address]
    while subprocess.run(members, env=environment, capture_output=True, check=False).returncode:
        pass  # the other machine is joining

    done = drive(address, environment, tmp_path, _RUN)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == wanted
    assert processes[-1].wait(60) != 0
    assert "refused" not in found["events"]
    driver = (tmp_path / "driver").read_text()
    nodes = {file.name: file.read_text().splitlines() for file in tmp_path.glob("?" * len(driver))}
    [lost] = [trained for node, trained in nodes.items() if node != driver]
    assert len(lost) == 2  # it was killed at its second
    assert lost[1].split()[1:] in [trained.split()[1:] for trained in nodes[driver]]
