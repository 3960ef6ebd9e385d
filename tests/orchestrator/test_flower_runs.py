"""Our strategies and our ClientApp in Flower's own loop, against runs of weft's."""

from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch.testing import assert_close

from clients.assignment import PluginChoice, Privacy
from clients.flower import client_app, first_arrays, tensors_of
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.flower_strategy import WeftStrategy
from strategies.base import ClientSpec, beneath

SEED, ROUNDS = 5, 2


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Say of the process what Flower's runtime says before messages can be made."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


@pytest.fixture(autouse=True)
def torch_as_before():
    """Undo the process-wide settings that a worker makes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


class Nodes:
    """A grid whose nodes run the ClientApp in this process, as Flower's runtime runs it."""

    def __init__(self, app, clients):
        self.app, self.clients = app, clients
        self.errors = []

    def get_node_ids(self):
        return [100 + i for i in range(len(self.clients))]

    def send_and_receive(self, messages, *, timeout=None):
        return [self._reply(message) for message in messages]

    def _reply(self, message):
        node = message.metadata.dst_node_id
        config = {"partition-id": node - 100, "client": self.clients[node - 100]}
        try:
            return self.app(message, Context(77, node, config, RecordDict(), {}))
        except Exception as error:
            self.errors.append(error)
            return Message(Error(2, "the ClientApp failed"), reply_to=message)


@pytest.fixture
def ran(home, tiny):
    """Return a function that runs weft itself: its last version, and what each client was asked."""

    def run(strategy, **changes):
        asked = {}

        def seen(assignment, *rest):
            if assignment.action == "train":
                asked[assignment.client] = replace(assignment, seed=SEED, underlay={})
            return perform(assignment, *rest)

        config = tiny(strategy=strategy, rounds=ROUNDS, seed=SEED, **changes)
        version = service.launch(home, config, backend=InlineBackend(seen))
        return version, asked

    return run


@pytest.fixture
def flown(tmp_path):
    """Return a function that runs Flower's own loop: its result, and the nodes."""

    def run(strategy, asked, **kept):
        site = str(tmp_path / "flower-sites")
        templates = {name: replace(a, site=site, **kept) for name, a in asked.items()}
        app = client_app(
            lambda context: templates[context.node_config["client"]],
            lambda context: templates[context.node_config["client"]],
        )
        nodes = Nodes(app, sorted(templates))
        first = first_arrays(next(iter(templates.values())))
        return strategy.start(nodes, first, num_rounds=ROUNDS), nodes

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["fedsvd", "flora", "fedsa-lora"])
def test_flowers_loop_makes_the_version_that_weft_makes(name, ran, flown, home):
    """With products, with what lies beneath the adapter, and with tensors that stay at a client."""
    version, asked = ran(name)
    strategy = WeftStrategy(name, seed=SEED)
    result, nodes = flown(strategy, asked)
    assert not nodes.errors
    assert same(tensors_of(result.arrays), home.store.tensors(version))
    assert same(strategy.state.auxiliary, home.store.auxiliary(version))
    assert bool(beneath(strategy.state.auxiliary)) is (name == "flora")
    assert [m["num-updates"] for m in result.train_metrics_clientapp.values()] == [2, 2]


def test_under_flowers_own_fedavg_our_client_gives_what_our_fedavg_does(ran, flown, home):
    version, asked = ran("fedavg")
    result, nodes = flown(FedAvg(fraction_evaluate=0.0), asked)
    assert not nodes.errors
    assert_close(tensors_of(result.arrays), home.store.tensors(version), rtol=1e-4, atol=1e-5)


def test_our_client_evaluates_for_both(ran, flown):
    _, asked = ran("fedavg")
    results = [
        flown(strategy, asked)[0].evaluate_metrics_clientapp
        for strategy in (FedAvg(), WeftStrategy("fedavg", sampling=FedAvg(), seed=SEED))
    ]
    for flowers, ours in zip(*(r.values() for r in results), strict=True):
        assert {"accuracy", "macro_f1", "loss"} <= set(ours)
        assert_close(dict(flowers), dict(ours), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"privacy": Privacy(1.0, 1.0, 0.5)}, "with privacy cannot be trained in a Flower run"),
        ({"uplink": (PluginChoice("float16"),)}, "uplink must be empty"),
        ({"held": {}}, "no log there says what a client holds"),
        ({"regularizers": (PluginChoice("lwf"),)}, "'lwf' goes on from earlier tasks"),
        ({"regularizers": (PluginChoice("replay"),)}, "'replay' goes on from earlier tasks"),
        ({"regularizers": (PluginChoice("ewc"),)}, "'ewc' has clients read their data"),
        ({"regularizers": (PluginChoice("inflora"),)}, "'inflora' has clients read their data"),
    ],
)
def test_what_flower_cannot_give_fails_at_the_client_and_changes_nothing(kept, why, ran, flown):
    _, asked = ran("fedavg")
    strategy = WeftStrategy("fedavg", clients=lambda node: ClientSpec(f"site-{node}"))
    result, nodes = flown(strategy, asked, **kept)
    assert [why in str(error) for error in nodes.errors] == [True] * 2 * ROUNDS
    assert [m["num-refused"] for m in result.train_metrics_clientapp.values()] == [2, 2]
    assert same(tensors_of(result.arrays), tensors_of(first_arrays(replace(asked["a"], seed=SEED))))
