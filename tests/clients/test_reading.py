"""What a client makes of its data: a function of them and of the model, and only where it may."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import PluginChoice, Privacy
from clients.reading import NothingToRead, NotPrivate, read, wanted
from clients.session import opened
from clients.trainer import train
from clients.worker import perform

EWC = (PluginChoice("ewc"),)
MAS = (PluginChoice("mas"),)
SI = (PluginChoice("si"),)
LABELS = ("cat", "dog", "model", "rank")


@pytest.fixture
def asked(assign):
    """Return a function that makes the assignment of a reading of a result that was trained."""

    def make(methods, **changes):
        first = assign(**changes)
        trained = {**first.broadcast.tensors, **train(first).tensors}
        sent = replace(first.broadcast, tensors=trained)
        return replace(
            first, action="consolidate", round=2, broadcast=sent, regularizers=methods, seed=5
        )

    return make


def by_hand(assignment, value):
    """Return the mean over examples of what ``value`` makes of each one's own gradients."""
    from clients import data

    with opened(assignment) as session:
        session.write(assignment.broadcast.tensors)
        session.model.eval()
        live = {n: p.requires_grad_(True) for n, p in session.parameters().items()}
        examples = data.examples(assignment.data, assignment.model)
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        total = dict.fromkeys(live, 0.0)
        for one in encoded:
            output, squares = value(session.model, data.collate([one], 0))
            found = torch.autograd.grad(output, list(live.values()))
            total = {n: total[n] + squares(g) for n, g in zip(live, found, strict=True)}
        return {n: t / len(encoded) for n, t in total.items()}


def loss(model, batch):
    return model.example_losses(model(batch), batch).sum(), torch.square


def length(model, batch):
    return model(batch).square().sum(), torch.abs


@pytest.mark.parametrize(
    ("methods", "kind", "value"),
    [(EWC, "ewc/fisher", loss), (MAS, "mas/importance", length)],
    ids=["ewc", "mas"],
)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_importance_is_the_mean_over_examples_by_hand(asked, methods, kind, value, adapter):
    """With DoRA no engine of per-example gradients serves: example by example, to the same."""
    assignment = asked(methods, adapter=PluginChoice(adapter, {"r": 2, "layers": [0]}))
    update = perform(assignment)
    assert update.tensors == {}
    assert update.num_examples == 10
    reference = by_hand(assignment, value)
    assert {f"{kind}/{n}" for n in reference} == update.memory.keys()
    assert any(t.abs().max() > 1e-6 for t in reference.values())
    for name, wanted_ in reference.items():
        torch.testing.assert_close(update.memory[f"{kind}/{name}"], wanted_, rtol=1e-4, atol=1e-9)


def test_labels_drawn_from_the_model_are_of_the_task_and_follow_from_the_seed(assign):
    method = (PluginChoice("ewc", {"labels": "model"}),)
    changes = {"action": "consolidate", "round": 2, "regularizers": method, "seed": 5}
    assignment = replace(assign(), labels=("cat", "dog"), **changes)
    one = read(assignment, "consolidate").memory
    again = read(replace(assignment, client="other"), "consolidate").memory
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert all(t.isfinite().all() for t in one.values())
    head = one["ewc/fisher/head.weight"]
    assert (head[:2] > 0).any()
    assert (head[2:] == 0).all()  # labels of other tasks are neither drawn nor in the softmax
    other = read(replace(assignment, seed=6), "consolidate").memory
    assert not torch.equal(other["ewc/fisher/head.bias"], one["ewc/fisher/head.bias"])


def test_a_second_reading_of_one_assignment_sends_the_first_ones_bytes(asked, tmp_path):
    assignment = asked(EWC)
    one = read(assignment, "consolidate")
    (tmp_path / "rows-10.jsonl").write_text("")  # the data are gone
    again = read(assignment, "consolidate")
    assert again.memory.keys() == one.memory.keys()
    assert all(torch.equal(one.memory[n], again.memory[n]) for n in one.memory)
    with pytest.raises(NothingToRead, match="clinic-7 has no example for this task"):
        read(replace(assignment, seed=6), "consolidate")


def test_what_is_sent_is_what_is_wanted(asked):
    for methods in (EWC, MAS, SI, EWC + MAS + SI):
        assignment = asked(methods)
        found = read(assignment, "consolidate").memory
        shapes = {name: tuple(part.shape) for name, part in found.items()}
        assert shapes == wanted(assignment, "consolidate")
        assert all(part.dtype == torch.float32 for part in found.values())


def test_a_private_client_reads_no_data_whoever_asks(asked):
    privacy = Privacy(1.0, 1.0, 0.1, insecure_seed=1)
    with pytest.raises(NotPrivate, match="'ewc' reads data, which is not private"):
        read(replace(asked(EWC), privacy=privacy), "consolidate")
    update = read(replace(asked(SI), privacy=privacy), "consolidate")
    assert (update.num_examples, update.fingerprint, update.spends) == (100, "", ())


def test_what_enters_the_layers_is_seen_without_padding(asked):
    from clients.regularizers import REGULARIZERS
    from strategies.plugins import Plugin

    seen = []

    class Look(type(REGULARIZERS.get("ewc").build())):
        def consolidate_from_data(self, reading, memory):
            seen.extend(reading.inputs())
            tokens = [int(batch.attention_mask.sum()) for batch in reading.batches()]
            assert [len(rows) for one in seen for rows in one.values()] == [
                n for n in tokens for _ in range(2)
            ]
            return super().consolidate_from_data(reading, memory)

    plugin = Plugin("regularizer", "look", Look, "Look.", "", family=REGULARIZERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGULARIZERS._plugins, "look", plugin)
        read(asked((PluginChoice("look"),)), "consolidate")
    layers = {layer for one in seen for layer in one}
    assert len(layers) == 2
    assert all(rows.shape[1] == 32 for one in seen for rows in one.values())


def test_a_client_goes_on_with_what_it_observed_and_sends_it_divided_by_its_way(assign):
    """Two rounds of SI, of one client: the way is the sum over both, by hand from its steps."""
    first = replace(assign(), regularizers=SI, optimizer=PluginChoice("sgd", {"lr": 0.5}))
    plain = replace(first, regularizers=(), site=first.site + "-plain")
    one = train(first)
    assert all(torch.equal(one.tensors[n], t) for n, t in train(plain).tensors.items())
    assert one.memory == {}
    sent = replace(first.broadcast, tensors={**first.broadcast.tensors, **one.tensors})
    two = train(replace(first, round=2, broadcast=sent, seed=1))
    end = {**sent.tensors, **two.tensors}
    asked = replace(
        first, action="consolidate", round=3, broadcast=replace(sent, tensors=end), steps=None
    )
    found = read(asked, "consolidate").memory

    ways = _ways(first, sent, 2)
    for name, way in ways.items():
        away = (end[name] - first.broadcast.tensors[name]).square()
        torch.testing.assert_close(
            found[f"si/importance/{name}"], way / (away + 1e-3), rtol=1e-3, atol=1e-6
        )
    never = read(replace(asked, client="clinic-8"), "consolidate").memory
    assert all((part == 0).all() for part in never.values())


def _ways(first, sent, rounds):
    """Return what SI adds up, from single steps of plain SGD: -gradient is change / lr."""
    ways = {}
    for round_ in range(1, rounds + 1):
        start = first.broadcast if round_ == 1 else sent
        before = dict(start.tensors)
        for steps in range(1, first.steps + 1):
            one = replace(
                first,
                regularizers=(),
                round=round_,
                broadcast=start,
                seed=round_ - 1,
                steps=steps,
                site=f"{first.site}-{round_}-{steps}",
            )
            after = {**start.tensors, **train(one).tensors}
            for name in train(one).tensors:
                moved = after[name] - before[name]
                ways[name] = ways.get(name, 0) + moved.square() / 0.5
            before = after
    return ways
