"""The backends that the contract is for, each with two places to work and clients that pretend."""

import os
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest
import ray
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from clients.downlink import NotHeld
from clients.evaluate import Evaluation
from clients.flower_site import Answering, serve
from clients.node import running
from clients.orders import Refusal, Reply, Terms, pack_reply, unpack_order
from clients.reasons import reason_of
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.ray import RayBackend
from orchestrator.backends.ray_cluster import start_ray
from orchestrator.backends.sites import Calling, SitesBackend
from orchestrator.superlink_home import SuperLinkHome, superlink_of
from orchestrator.superlink_server import Listening, SuperLinkServer
from strategies.base import Update
from strategies.plugins import BadOptions

BACKENDS = [
    pytest.param("inline_backend", id="inline"),
    pytest.param(
        "ray_backend",
        id="ray",
        marks=[pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")],
    ),
    pytest.param("sites_backend", id="sites", marks=pytest.mark.slow),
]
"""Fixtures that return a backend which runs :func:`pretend`; another one is an entry here."""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    """Each backend in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pretend():
    """What a worker does: what the client's name says, instead of training."""

    def pretend(assignment, stepped):  # a function of a fixture travels to workers as it is
        who, round_ = assignment.client, assignment.round
        kind = who.partition("-")[0]
        if kind == "score":
            return Evaluation(who, round_, 4, {"accuracy": 0.75}, {"cat": 0.5})
        if kind == "leak":
            raise KeyError("patient 0815")
        if kind == "bad":
            raise BadOptions("rank must be\n  at least 1, got 0")
        if kind == "bare":
            raise NotHeld("the client holds no 'tensors/a', which was left out; send it whole")
        add, sent = assignment.memory.get("add"), dict(assignment.broadcast.tensors)
        sent = sent if add is None else {n: t + add for n, t in sent.items()}
        told = {"loss": 0.1 + 0.2}
        return Update(who, round_, assignment.base, sent, 3, told, dict(assignment.underlay))

    return pretend


@pytest.fixture(scope="module")
def inline_backend(pretend):
    return InlineBackend(pretend)


@pytest.fixture(scope="module")
def ray_backend(pretend):
    start_ray(2)
    made = RayBackend(workers=2, perform=pretend, grace_s=0.5)
    yield made
    made.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def sites_backend(pretend, tmp_path_factory):
    """A SuperLink as weft starts it, with TLS, and one node with a key, which has all clients."""
    home = tmp_path_factory.mktemp("sites")
    own, stop = SuperLinkHome.of(home), threading.Event()
    private = ec.generate_private_key(ec.SECP384R1())
    key = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (home / "node.key").write_bytes(key)
    (home / "node.secret").write_bytes(b"between the node and its worker")
    up = threading.Event()
    server = SuperLinkServer(own, Listening(port=_free_port()), stop)
    started = (lambda link: link.register(public, "north"), up.set)
    threads = [threading.Thread(target=server.serve, args=started)]
    threads[0].start()
    assert up.wait(240)

    address = f"127.0.0.1:{_free_port()}"
    node = _supernode(home, server.listening.address, own.authority, address)
    answering = Answering(address, b"between the node and its worker")
    answer = _answers(pretend)
    threads.append(threading.Thread(target=serve, args=(answering, answer, stop)))
    threads[1].start()
    terms = Terms("fedavg", "notes", "0.1.0", "1.41", 0.0)
    calling = Calling(terms, 300.0, lambda client: ("north", public))
    backend = SitesBackend(superlink_of(home), calling, home / "run" / "sites.json")
    yield backend
    backend.close()
    node.terminate()
    node.wait()
    stop.set()
    for thread in threads:
        thread.join()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _supernode(home, superlink, authority, address):
    host, port = address.split(":")
    command = [*running._program(), "--superlink", superlink]
    command += ["--host", host, "--port", port, "--root-certificates", authority]
    command += ["--auth-supernode-private-key", home / "node.key", "--isolation", "process"]
    command += ["--superexec-auth-secret-file", home / "node.secret"]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment = {**os.environ, **quiet, "FLWR_HOME": str(home / "flwr")}
    with (home / "node.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _answers(perform):
    """Return what a site does with an order, if that is what a worker would do."""

    def answer(order):
        began = time.monotonic()
        assignment, _ = unpack_order(order)
        try:
            result = perform(assignment, lambda step, steps: None)
            if isinstance(result, Update):  # the same tensors twice are no file
                kept = {name: tensor.clone() for name, tensor in result.memory.items()}
                result = replace(result, memory=kept)
        except Exception as error:
            reason, missing = reason_of(assignment, error), isinstance(error, NotHeld)
            result = Refusal(assignment.client, assignment.round, reason, missing)
        return pack_reply(Reply(result, {"seconds": time.monotonic() - began}))

    return answer
