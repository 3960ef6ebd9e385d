"""A real SuperLink and a real SuperNode: what of Flower weft relies on beyond its interface."""

import os
import secrets
import socket
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from clients.flower_messages import TooLarge
from clients.flower_program import path_of
from clients.flower_site import Answering, serve
from clients.node import running
from clients.orders import Order
from orchestrator import nodes
from orchestrator.backends.superlink import (
    Endpoint,
    KeySpent,
    Lost,
    Mishap,
    Refused,
    RuntimeGone,
    SuperLink,
    TaskLost,
)
from orchestrator.backends.thin_app import thin_app
from orchestrator.node_keys import keys_in_step

pytestmark = pytest.mark.timeout(300)

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Way(ThreadingHTTPServer):
    """What lies between a SuperNode and its SuperLink, where connections can break.

    Attributes:
        cuts: of the next request to each of these, the answer does not arrive; the connection
            breaks when the event is set.
    """

    daemon_threads = True

    def __init__(self, superlink):
        super().__init__(("127.0.0.1", 0), Passing)
        self.to = httpx.Client(base_url=f"http://{superlink}", timeout=60)
        self.cuts = {}
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()
        self.to.close()


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        try:
            found = self.server.to.post(self.path, content=content, headers=kept)
        except httpx.TransportError:  # it is not there yet
            self.close_connection = True
            return
        if (broken := self.server.cuts.pop(self.path, None)) is not None:
            self.close_connection = broken.wait()
            return
        self.send_response(found.status_code)
        self.send_header("Content-Type", found.headers.get("content-type", ""))
        self.send_header("Content-Length", str(len(found.content)))
        self.end_headers()
        self.wfile.write(found.content)

    def log_message(self, *what):
        pass


class Flower:
    """A SuperLink and a SuperNode without TLS, and a site that answers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret, self.node_secret = secrets.token_bytes(32), secrets.token_bytes(32)
        (folder / "link").write_bytes(self.secret)
        (folder / "node").write_bytes(self.node_secret)
        ports = free_port(), free_port()
        self.address, self.node_address = (f"127.0.0.1:{port}" for port in ports)
        listen = ["--insecure", "--host", "127.0.0.1", "--isolation", "process"]
        secret = "--superexec-auth-secret-file"
        database = ["--database", str(folder / "state.db")]
        link = [*listen, "--port", str(ports[0]), secret, str(folder / "link"), *database]
        node = [*listen, "--port", str(ports[1]), secret, str(folder / "node")]
        self.way = Way(self.address)
        self.processes = [
            self.start([str(path_of("flower-superlink")), *link]),
            self.start([*running._program(), *node, "--superlink", self.way.address]),
        ]
        self.orders = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.stop = threading.Event()
        answering = Answering(self.node_address, self.node_secret, most_bytes=20_000_000)
        self.site = threading.Thread(target=serve, args=(answering, self.answer, self.stop))
        self.site.start()
        self.link = self.connect()
        self.node = self.wait_for_node()

    def start(self, command):
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self.folder / "flwr")}
        with (self.folder / "flower.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def connect(self, secret=None, database=None):
        return SuperLink(Endpoint(self.address, plain=True), secret or self.secret, database)

    def wait_for_node(self):
        while True:
            try:
                online = [node for node in self.link.nodes() if node.online]
            except RuntimeGone:
                online = []
            if online:
                return online[0]
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.2)

    def answer(self, order):
        self.orders.append(order)
        self.may_answer.wait()
        if order.header == b"bug":
            raise ZeroDivisionError("patient 0815")
        return b"answer to " + order.header

    def push(self, claim, header, parts=None, patience=60.0):
        return claim.push(self.node.id, Order(header, parts or {}), time.time() + patience, "1")

    def close(self):
        self.may_answer.set()
        self.stop.set()
        self.site.join()
        for process in reversed(self.processes):
            process.terminate()
            process.wait()
        self.way.close()
        self.link.close()


def collect(claim, *messages):
    """Return what comes back, by message."""
    found = {}
    while set(found) != set(messages):
        for arrived in claim.replies(set(messages) - set(found)):
            found[arrived.to] = claim.fetch(arrived, 10**8)
        time.sleep(0.05)
    return [found[message] for message in messages]


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    running = Flower(tmp_path_factory.mktemp("flower"))
    yield running
    running.close()


@pytest.fixture
def claim(flower):
    made = flower.link.claim()
    yield made
    made.finish()
    made.close()


def test_an_order_arrives_whole_and_so_does_its_reply(flower, claim):
    parts = {"a" * 64: secrets.token_bytes(6_000_000), "b" * 64: b"1"}  # more than one chunk

    message = flower.push(claim, b"first", parts)

    assert collect(claim, message) == [b"answer to first"]
    assert flower.orders[-1] == Order(b"first", parts)


def test_an_answer_is_sent_on_where_the_word_that_a_part_arrived_was_lost(flower, claim):
    flower.way.cuts["/v1/fleet/push-object"] = broken = threading.Event()
    broken.set()

    message = flower.push(claim, b"broken off")

    assert collect(claim, message) == [b"answer to broken off"]
    assert not flower.way.cuts


def test_an_answer_that_is_lost_in_the_superlink_comes_when_it_is_asked_for_again(flower, claim):
    flower.way.cuts["/v1/fleet/push-messages"] = broken = threading.Event()
    first = flower.push(claim, b"lost")
    while not (told := claim.replies([first])):
        time.sleep(0.05)
    broken.set()

    with pytest.raises(Lost):
        claim.fetch(told[0], 10**8, lambda waited_s: waited_s < 5)

    assert not flower.way.cuts
    assert collect(claim, flower.push(claim, b"lost")) == [b"answer to lost"]


def test_half_a_minute_shows_that_a_node_is_gone(flower):
    with closing(sqlite3.connect(flower.folder / "state.db")) as database:
        query = "SELECT heartbeat_interval FROM node WHERE status = 'online'"
        assert database.execute(query).fetchall() == [(15.0,)]


def test_another_process_goes_on_with_what_is_on_its_way(flower, claim):
    flower.may_answer.clear()
    message = flower.push(claim, b"second")

    other = flower.link.attach(claim.task)
    flower.may_answer.set()

    assert collect(other, message) == [b"answer to second"]
    other.close()


def test_of_a_bug_at_a_site_only_its_kind_leaves_the_site(flower, claim):
    [found] = collect(claim, flower.push(claim, b"bug"))

    assert found == Mishap(2, "ZeroDivisionError at the site (its text stays there)")


@pytest.mark.parametrize("content", [secrets.token_bytes, bytes], ids=["random", "of one chunk"])
def test_an_order_that_is_larger_than_a_site_takes_is_answered_with_its_limit(
    flower, claim, content
):
    before = len(flower.orders)

    [found] = collect(claim, flower.push(claim, b"large", {"a" * 64: content(20_000_000)}))

    assert found.code == 2
    assert "larger than 20000000 bytes, which is max_order_mb in its node.yaml" in found.reason
    assert len(flower.orders) == before


def test_a_reply_that_is_larger_than_it_may_be_is_not_held(flower, claim):
    message = flower.push(claim, bytes(3_000_000))
    while not (arrived := claim.replies([message])):
        time.sleep(0.05)

    with pytest.raises(TooLarge, match="larger than 2000000 bytes"):
        claim.fetch(arrived[0], 2_000_000)


def test_what_nobody_fetched_in_time_is_not_delivered(flower, claim):
    flower.may_answer.clear()
    before = len(flower.orders)
    busy = flower.push(claim, b"busy")
    late = flower.push(claim, b"late", patience=2.0)

    [found] = collect(claim, late)
    flower.may_answer.set()

    assert found.code == 3
    assert collect(claim, busy) == [b"answer to busy"]
    assert [order.header for order in flower.orders[before:]] == [b"busy"]


def test_a_run_that_is_stopped_is_lost_to_whoever_drives_it(flower, claim):
    flower.link.stop(claim.task.run)
    flower.link.stop(claim.task.run)

    with pytest.raises(TaskLost):
        flower.push(claim, b"third")
    with pytest.raises(TaskLost):
        flower.link.attach(claim.task)


def test_without_the_secret_nobody_claims_a_run(flower):
    stranger = flower.connect(secret=b"guessed")

    with pytest.raises(Refused, match="does not take the secret"):
        stranger.claim()
    stranger.close()


def test_a_site_with_another_secret_is_told_so(flower):
    answering = Answering(flower.node_address, b"guessed")

    with pytest.raises(Refused, match="does not take the secret"):
        serve(answering, flower.answer, threading.Event())


def test_a_key_can_be_registered_again_only_where_the_database_is(flower):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    first = flower.link.register(key, "north")
    assert flower.link.register(key, "north") == first
    flower.link.unregister(first)
    assert first not in [node.id for node in flower.link.nodes()]

    with pytest.raises(KeySpent, match="weft node rotate"):
        flower.link.register(key, "north")
    local = flower.connect(database=flower.folder / "state.db")
    again = local.register(key, "north")
    local.close()

    [node] = [node for node in flower.link.nodes() if node.id == again]
    assert (node.name, node.status, node.last_seen) == ("north", "registered", 0.0)


def test_the_keys_that_it_lets_in_are_those_that_the_ledger_does(flower, workspace, site):
    north, ledger = site(), workspace.ledger
    nodes.admit(ledger, north.join(), nodes.Terms())
    local = flower.connect(database=flower.folder / "state.db")

    def let_in():
        step = keys_in_step(local, ledger)
        assert step.problems == ()
        return [node.id for node in local.nodes() if node.public_key == north.key.public.pem]

    [number] = let_in()
    assert ledger.nodes.sightings()["north"].flower_id == str(number)
    nodes.disable(ledger, "north")
    assert let_in() == []
    nodes.enable(ledger, "north")
    assert len(let_in()) == 1
    old = north.key.public.pem
    north.rotate()
    nodes.rotate(ledger, north.join())
    assert len(let_in()) == 1
    assert old not in [node.public_key for node in local.nodes()]
    nodes.remove(ledger, "north")
    assert let_in() == []
    assert flower.node.id in [node.id for node in local.nodes()]  # of which it knows nothing
    local.close()


def test_a_superlink_that_is_not_there_is_gone():
    link = SuperLink(Endpoint(f"127.0.0.1:{free_port()}", plain=True), b"secret")

    with pytest.raises(RuntimeGone, match="does not answer"):
        link.nodes()
    link.close()


def test_the_app_of_a_run_is_the_same_bytes_each_time():
    assert thin_app() == thin_app()
    assert len(thin_app()) < 5000
