"""Weft as a Flower app: sites behind a Grid, by Flower's documented interface alone."""

import importlib
import io
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.assignment import DataSpec
from clients.flower import order_of, reply_record
from clients.orders import Reply, Terms, pack_reply, unpack_order
from orchestrator.backends.base import Failure, complete
from orchestrator.backends.sites import Calling, SitesBackend
from orchestrator.backends.superlink import canonical_key
from orchestrator.backends.thin_app import thin_app
from orchestrator.flower_app import GridLink
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update

KEY = ec.generate_private_key(ec.SECP384R1()).public_key()
PEM = KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class OneNode(Grid):
    """A Grid with one node, which answers at once; client b's order goes wrong there."""

    def __init__(self):
        self.replies = {}

    run = property(lambda self: None)

    def set_run(self, run):
        pass

    def create_message(self, *content):
        raise NotImplementedError

    def get_node_ids(self):
        return [7]

    def get_nodes(self):
        at = "2026-01-01T00:00:00+00:00"
        known = {5: b"", 6: b"-----BEGIN PUBLIC KEY-----\nnone", 7: PEM, 8: b"ssh-rsa none"}
        return [
            SimpleNamespace(node_id=n, public_key=key, name="", last_activated_at=at * (n % 2))
            for n, key in known.items()
        ]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            assert message.metadata.dst_node_id == 7
            ids.append(f"m{len(self.replies)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            asked, _ = unpack_order(order_of(message.content))
            update = Update(asked.client, asked.round, asked.base, asked.broadcast.tensors, 1)
            said = reply_record(pack_reply(Reply(update)))
            self.replies[ids[-1]] = Message(
                Error(8, "gone") if asked.client == "b" else said, reply_to=message
            )
        return ids

    def pull_messages(self, message_ids):
        return [self.replies[i] for i in message_ids]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


@pytest.fixture
def asked(make_plan, tensors, monkeypatch):
    """Return a round's assignments of clients a, b and c, in a process as Flower starts one."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    inputs = RoundInputs(1, "f" * 64, {}, {}, "")
    plan = make_plan(noise=None)
    planned = plan_round(plan, inputs, lambda client: Broadcast(tensors()), plan.participants)
    model = replace(plan.model, hash="0" * 64)
    return [replace(a, data=DataSpec("site:notes"), model=model) for a in planned]


def test_the_federation_s_orders_go_over_a_grid_and_back(asked, tmp_path):
    terms = Terms("fedavg", "notes", "0.1.0", "1.41", 0.0)
    calling = Calling(terms, 60.0, lambda client: ("north", PEM))
    backend = SitesBackend(GridLink(OneNode()), calling, tmp_path / "sites.json")

    results = {r.client: r for r in complete(backend, asked, 60.0, lambda a: None)}
    backend.close()

    assert {c: type(r) for c, r in results.items()} == {"a": Update, "b": Failure, "c": Update}
    assert results["b"].reason == "the worker of node north died while it worked"


def test_of_a_grid_s_nodes_only_those_with_a_key_can_be_anybody_s():
    [node] = GridLink(OneNode()).nodes()

    assert (node.id, node.public_key, node.online) == (7, canonical_key(PEM), True)


def test_the_app_s_modules_are_what_is_installed():
    with zipfile.ZipFile(io.BytesIO(thin_app())) as bundle:
        lines = {name: bundle.read(f"weft_app/{name}.py").decode() for name in ("server", "client")}

    module = importlib.import_module("orchestrator.flower_app")
    for name, line in lines.items():
        assert line == f"from orchestrator.flower_app import {name}\n\napp = {name}\n"
        assert callable(getattr(module, name))
