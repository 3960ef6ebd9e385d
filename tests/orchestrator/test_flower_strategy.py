"""Every strategy under Flower's messages: the same states, and odd replies are refused."""

import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch.testing import assert_close

from clients.assignment import PluginChoice
from clients.flower import arrays_of, tensors_of
from clients.seeds import seed_for
from clients.uplink import encoded
from orchestrator.flower_strategy import BadFlowerRun, WeftStrategy
from strategies import STRATEGIES
from strategies.base import Broadcast, ClientSpec, Setting, Update, beneath
from strategies.plugins import BadOptions
from strategies.selection import compact
from strategies.tensors import B_AND_HEAD

NODES = {17: "c", 11: "b", 23: "a", 5: "d"}
COUNTS = {"a": 1, "b": 2, "c": 5, "d": 3}


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Say of the process what Flower's runtime says before messages can be made."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


class Nodes:
    """As much of a grid as sampling asks for."""

    def get_node_ids(self):
        return list(NODES)


def named(node):
    return ClientSpec(NODES[node])


def wrapped(name, sampling=None, **options):
    sampling = sampling or FedAvg(min_train_nodes=len(NODES), fraction_evaluate=0.0)
    return WeftStrategy(name, sampling=sampling, clients=named, seed=7, **options)


def moved(client, round_, tensors, trainable, personal):
    """What a client trains: noise on what is trained and not its own."""
    generator = torch.Generator().manual_seed(seed_for(client, round_))
    return {
        n: t + torch.randn(t.shape, generator=generator)
        for n, t in sorted(tensors.items())
        if re.fullmatch(trainable, n) and not re.fullmatch(personal, n)
    }


def travelled(content):
    """As it is at the other end."""
    return recorddict_from_proto(recorddict_to_proto(content))


def answer(message, round_=1, change=lambda tensors: tensors, metrics=None):
    client = NODES[message.metadata.dst_node_id]
    content = travelled(message.content)
    words = content["weft"]
    tensors = tensors_of(content["arrays"])
    trained = change(moved(client, round_, tensors, words["trainable"], words["personal"]))
    numbers = {"num-examples": COUNTS[client], "loss": 0.5} if metrics is None else metrics
    records = {"arrays": arrays_of(trained), "metrics": MetricRecord(numbers)}
    return Message(travelled(RecordDict(records)), reply_to=message)


def failed(message):
    return Message(Error(2, "out of memory"), reply_to=message)


def not_numbers(message):
    return answer(message, change=lambda tensors: {n: t * torch.nan for n, t in tensors.items()})


def asked(strategy, tensors, round_=1):
    return list(strategy.configure_train(round_, arrays_of(tensors), ConfigRecord(), Nodes()))


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_strategy_has_the_states_under_flower_that_it_has_by_itself(name, tensors):
    """Although a reply of each round is an error, or not a number."""
    plugin = STRATEGIES.get(name)
    options = plugin.factory.mean_options
    alone, under = plugin.build(**options), wrapped(name, **options)
    adapter = tensors(layers=("k", "q"))
    if "core" in alone.capabilities:
        adapter |= {f"{layer}.lora_core.weight": torch.eye(2) for layer in "kq"}
    if "directions" in alone.capabilities:
        adapter |= {f"{layer}.lora_magnitudes": torch.ones(1) for layer in "kq"}
    state = alone.init(adapter, Setting(len(NODES), len(NODES), seed_for(7, 0, "strategy")))
    arrays, config = arrays_of(adapter), ConfigRecord()

    for round_ in (1, 2):
        updates = []
        for client in "abc":
            sent = alone.broadcast(state, ClientSpec(client))
            trained = moved(client, round_, sent.tensors, sent.trainable, sent.personal)
            updates.append(Update(client, round_, "", trained, COUNTS[client], {"loss": 0.5}))
        messages = list(under.configure_train(round_, arrays, config, Nodes()))
        for message in messages:
            content = travelled(message.content)
            sent = alone.broadcast(state, ClientSpec(NODES[message.metadata.dst_node_id]))
            parts = {"arrays": sent.tensors, "weft.mask": sent.mask, "weft.extra": sent.extra}
            parts["weft.beneath"] = beneath(state.auxiliary)
            for key, part in parts.items():
                assert same(tensors_of(content.get(key, ArrayRecord())), part), key
            assert content["config"]["server-round"] == round_
        odd = failed if round_ == 1 else not_numbers
        replies = [
            odd(m) if NODES[m.metadata.dst_node_id] == "d" else answer(m, round_) for m in messages
        ]
        state = alone.aggregate(state, updates)
        arrays, metrics = under.aggregate_train(round_, replies)
        assert same(tensors_of(arrays), state.adapter)
        assert same(under.state.adapter, state.adapter)
        assert same(under.state.auxiliary, state.auxiliary)
        assert dict(metrics) == {
            **state.metrics, "loss": 0.5, "num-updates": 3, "num-refused": 1
        }  # fmt: skip


def refused(strategy, tensors, odd):
    """Return what a round gives in which client c's reply is odd: updates taken, and the state."""
    messages = asked(strategy, tensors())
    replies = [odd(m) if NODES[m.metadata.dst_node_id] == "c" else answer(m, 1) for m in messages]
    _, metrics = strategy.aggregate_train(1, replies)
    return int(metrics["num-updates"])


def other_arrays(message, name, array):
    reply = answer(message)
    reply.content["arrays"][name] = array
    return reply


ODD = {
    "1 non-finite values": lambda m: answer(
        m, change=lambda t: {**t, "head.bias": torch.tensor([0.0, torch.inf, 0.0, 0.0])}
    ),
    "head.bias is missing": lambda m: answer(
        m, change=lambda t: {n: x for n, x in t.items() if n != "head.bias"}
    ),
    "extra is not asked for": lambda m: answer(m, change=lambda t: {**t, "extra": torch.ones(1)}),
    "q.lora_A.weight is not asked for": lambda m: answer(
        m, change=lambda t: {**t, "q.lora_A.weight": torch.ones(2, 5)}
    ),
    r"head.bias is torch.float64 \[4\], expected torch.float32 \[4\]": lambda m: answer(
        m, change=lambda t: {**t, "head.bias": torch.ones(4, dtype=torch.float64)}
    ),
    r"head.bias is torch.float32 \[3\]": lambda m: answer(
        m, change=lambda t: {**t, "head.bias": torch.ones(3)}
    ),
    "allowed 100 .max_update_norm": lambda m: answer(
        m, change=lambda t: {n: x + 100 for n, x in t.items()}
    ),
    "'head.bias' cannot be read .ValueError": lambda m: other_arrays(
        m, "head.bias", Array("float32", (4,), "numpy.ndarray", b"cos\nsystem\n(S'true'\ntR.")
    ),
    "'head.bias' cannot be read .TypeError": lambda m: other_arrays(
        m, "head.bias", Array("float32", (4,), "pickle", b"")
    ),
    "num_examples must be from 1": lambda m: answer(m, metrics={"num-examples": 0}),
    "no whole number called 'num-examples'": lambda m: answer(m, metrics={"num-examples": 1.5}),
    "metric 'loss' is nan": lambda m: answer(
        m, metrics={"num-examples": 1, "loss": float("nan")}
    ),
    "'loss' is a list": lambda m: answer(m, metrics={"num-examples": 1, "loss": [0.5]}),
    "error 2 at node 17: out of memory": failed,
}  # fmt: skip


@pytest.mark.parametrize("why", ODD)
def test_an_odd_reply_is_refused_with_its_reason_and_the_others_count(why, tensors, caplog):
    strategy = wrapped("fedsvd", max_update_norm=100.0)
    assert refused(strategy, tensors, ODD[why]) == 3
    [line] = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert re.search(why, line), line


def test_a_second_reply_of_a_node_and_one_of_a_stranger_are_refused(tensors):
    strategy = wrapped("fedavg")
    first, *others = map(answer, asked(strategy, tensors()))
    stranger = answer(asked(wrapped("fedavg"), tensors())[0])
    stranger.metadata.__dict__["_src_node_id"] = 99
    _, metrics = strategy.aggregate_train(1, [first, *others, first, stranger])
    assert (metrics["num-updates"], metrics["num-refused"]) == (4, 2)


def test_a_client_that_answers_with_its_whole_model_is_taken_for_what_was_asked(tensors):
    """As a ClientApp does that was written for Flower's own strategies."""
    results = []
    for whole in (False, True):
        strategy = wrapped("fedsvd")
        messages = asked(strategy, tensors())
        sent = tensors_of(messages[0].content["arrays"])
        every = lambda trained, sent=sent: {**sent, **trained}  # noqa: E731
        replies = [answer(m, change=every) if whole else answer(m) for m in messages]
        results.append(tensors_of(strategy.aggregate_train(1, replies)[0]))
    assert same(*results)


def test_what_a_client_chose_of_its_ranks_is_taken_for_the_whole(tensors):
    strategy, adapter = wrapped("lora-a2", budget=1), tensors()
    messages = asked(strategy, adapter)
    name, mask = "q.lora_B.weight", torch.tensor([False, True])

    def selected(trained):
        return compact(trained, {name: mask})

    replies = [answer(m, change=selected) for m in messages]
    replies[0] = answer(messages[0])  # more than the budget
    strategy.aggregate_train(1, replies)
    after = strategy.state.adapter[name]
    assert torch.equal(after[:, 0], adapter[name][:, 0])
    values = {c: moved(c, 1, adapter, B_AND_HEAD, "")[name] for c in NODES.values()}
    del values[NODES[messages[0].metadata.dst_node_id]]
    total = sum(COUNTS[c] for c in values)
    mean = sum(COUNTS[c] * v[:, 1].double() for c, v in values.items()) / total
    assert_close(after[:, 1], mean.float())


def test_values_on_a_mask_may_come_alone_or_in_the_whole_tensor(tensors):
    states = []
    for alone in (True, False):
        strategy, arrays = wrapped("lori", sparsity=0.5), tensors()
        for round_ in (1, 2):
            messages = asked(strategy, arrays, round_)
            sent = Broadcast({}, mask=tensors_of(messages[0].content.get("weft.mask", {})))
            change = (lambda t, sent=sent: encoded(t, sent, (), 0, {})[0]) if alone else dict
            strategy.aggregate_train(round_, [answer(m, round_, change) for m in messages])
            arrays = strategy.state.adapter
        states.append(strategy.state.adapter)
    assert same(*states)
    assert int((states[0]["q.lora_B.weight"] != 0).sum()) == 6  # of 12


def test_clients_that_are_alike_are_sent_one_object(tensors):
    """An adapter is encoded once, however many nodes are sampled."""
    assert len({id(m.content) for m in asked(wrapped("fedavg"), tensors())}) == 1
    ranks = {"a": 1, "b": 1, "c": 2, "d": None}
    sampling = FedAvg(min_train_nodes=4, fraction_evaluate=0.0)
    strategy = WeftStrategy(
        "flexlora", sampling=sampling, clients=lambda n: ClientSpec(NODES[n], ranks[NODES[n]])
    )
    assert len({id(m.content) for m in asked(strategy, tensors())}) == 2


def test_the_order_of_replies_changes_no_bit(tensors):
    results = []
    for backwards in (1, -1):
        strategy = wrapped("fedavg")
        replies = [answer(m) for m in asked(strategy, tensors())][::backwards]
        results.append(tensors_of(strategy.aggregate_train(1, iter(replies))[0]))
    assert same(*results)


def test_a_round_with_too_few_updates_leaves_the_adapter_as_it_is(tensors):
    strategy = wrapped("multi-krum", inner="ffa-lora", hostile=1)
    messages = asked(strategy, tensors())
    before = strategy.state
    replies = [answer(messages[0]), *map(failed, messages[1:])]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert same(tensors_of(arrays), before.adapter)
    assert metrics["num-updates"] == 1
    assert asked(strategy, before.adapter, round_=2)


def test_a_run_is_resumed_from_the_state(tensors):
    strategy = wrapped("fedavgm")
    strategy.aggregate_train(1, map(answer, asked(strategy, tensors())))
    again = wrapped("fedavgm")
    again.state = replace(strategy.state)
    results = []
    for one in (strategy, again):
        messages = asked(one, one.state.adapter, round_=2)
        results.append(tensors_of(one.aggregate_train(2, [answer(m, 2) for m in messages])[0]))
    assert same(*results)


def test_arrays_of_another_run_are_refused(tensors):
    strategy = wrapped("fedavgm")
    strategy.aggregate_train(1, map(answer, asked(strategy, tensors())))
    with pytest.raises(BadFlowerRun, match="is not what the last round gave"):
        asked(strategy, tensors(seed=3), round_=2)


def test_updates_count_by_an_operators_label_where_the_strategy_weighs_by_one(tensors):
    def labelled(node):
        return ClientSpec(NODES[node], labels={"size": "3" if NODES[node] == "a" else "1"})

    adapter, sampling = tensors(), FedAvg(min_train_nodes=4, fraction_evaluate=0.0)
    strategy = WeftStrategy("fedavg", clients=labelled, sampling=sampling, weighting="label:size")
    replies = [answer(m) for m in asked(strategy, adapter)]
    sent = {NODES[r.metadata.src_node_id]: tensors_of(r.content["arrays"]) for r in replies}
    bias = [sent[c]["head.bias"].double() * (3 if c == "a" else 1) for c in "abcd"]
    after = tensors_of(strategy.aggregate_train(1, replies)[0])["head.bias"]
    torch.testing.assert_close(after, (sum(bias) / 6).float())


@pytest.mark.parametrize(
    "options",
    [
        {"name": "fltrust", "inner": "ffa-lora", "root": "a"},
        {"name": "fedavg", "weighting": "label:size"},
    ],
)
def test_a_strategy_that_must_know_a_client_says_that_somebody_must_tell_it(options):
    with pytest.raises(BadOptions, match="give clients, a function"):
        WeftStrategy(**options)


def test_what_an_adapter_keeps_frozen_is_not_waited_for(tensors):
    frozen = {"q.invocation": torch.tensor([11.0])}
    strategy = wrapped("fedavg", adapter=PluginChoice("alora", {"invocation": [11]}))
    trained = lambda t: {n: x for n, x in t.items() if n not in frozen}  # noqa: E731
    replies = [answer(m, change=trained) for m in asked(strategy, tensors() | frozen)]
    assert strategy.aggregate_train(1, replies)[1]["num-updates"] == 4


def test_evaluations_that_are_not_like_the_others_are_left_out(tensors):
    strategy = wrapped("fedavg", sampling=FedAvg(min_train_nodes=4, min_evaluate_nodes=4))
    arrays, _ = strategy.aggregate_train(1, map(answer, asked(strategy, tensors())))
    messages = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), Nodes()))
    said = [
        {"num-examples": 1, "accuracy": 0.5},
        {"num-examples": 3, "accuracy": 1.0},
        {"num-examples": 3, "accuracy": float("nan")},
        {"num-examples": 3, "accuracy": 1.0, "another": 1.0},
    ]
    replies = [
        Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)
        for message, numbers in zip(messages, said, strict=True)
    ]
    assert dict(strategy.aggregate_evaluate(1, replies)) == {"accuracy": 0.875}


def test_bfloat16_travels_bit_for_bit():
    tensors = {"a": torch.randn(3, 2).bfloat16(), "b": torch.tensor(2.0), "c": torch.arange(3)}
    assert same(tensors_of(travelled(RecordDict({"x": arrays_of(tensors)}))["x"]), tensors)
