"""Token classification whole: loss, training, exact private gradients, and scores by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from clients import data, models
from clients.adapters import ADAPTERS
from clients.assignment import DataSpec, ModelSpec, PluginChoice, Privacy
from clients.data import Batch
from clients.evaluate import NothingToScore, evaluate
from clients.gradients import PrivateGradient
from clients.noise import NoiseStream, insecure_key
from clients.per_example import ENGINES
from clients.trainer import train
from clients.verification import chosen
from strategies.base import Broadcast

LABELS = ("O", "B-CAT", "I-CAT", "B-DOG")
ROWS = [
    {"tokens": ["the", "cat", "sings"], "tags": ["B-CAT", "I-CAT", "O"]},
    {"tokens": ["a", "dog", "and", "the", "cat"], "tags": ["O", "B-DOG", "O", "B-CAT", "I-CAT"]},
    {"tokens": ["dog", "weaves"], "tags": ["B-DOG", "O"]},
    {"tokens": ["thread"], "tags": ["O"]},
]


@pytest.fixture
def spec(tiny_encoder):
    return ModelSpec(str(tiny_encoder), "token-classification", labels=LABELS, max_length=16)


@pytest.fixture
def tag(assign, spec):
    """Return a function that makes an assignment of tagged rows."""

    def make(rows=ROWS, **changes):
        return assign(rows=rows, **{"model": spec, **changes})

    return make


@pytest.fixture
def constant(tag):
    """Return a function that makes an evaluation whose logits are ``bias`` at every token."""

    def make(*bias, **changes):
        made = tag(**changes)
        tensors = dict(made.broadcast.tensors)
        tensors["head.weight"] = torch.zeros(4, 32)
        tensors["head.bias"] = torch.tensor(bias)
        return replace(made, action="evaluate", client="tester", broadcast=Broadcast(tensors))

    return make


def batch_of(rows, jsonl, base, spec):
    examples = data.examples(DataSpec(jsonl(*rows)), spec)
    encoded = data.encode(examples, base.tokenizer, spec)
    return data.collate(encoded, data.padding_id(base.tokenizer))


def part(batch, rows):
    return Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows])


@pytest.fixture
def model(spec):
    """A task model with LoRA whose B is not zero, in train mode."""
    base, adapter = models.load(spec), ADAPTERS.get("lora").build(r=2)
    torch.manual_seed(1)
    made = models.TaskModel(adapter.attach(base.backbone, {}), spec).train()
    trained = {**adapter.parameters(made.backbone), **made.head_parameters()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.requires_grad_(not name.endswith("scaling"))
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    yield made
    adapter.detach(made.backbone)


def test_an_example_s_loss_is_the_mean_over_its_own_words(model, spec, jsonl):
    batch = batch_of(ROWS, jsonl, models.load(spec), spec)

    logits = model(batch)
    losses = model.example_losses(logits, batch)

    assert logits.shape == (*batch.input_ids.shape, 4)
    for row, loss in enumerate(losses):
        words = batch.labels[row] != -100
        wanted = functional.cross_entropy(logits[row][words], batch.labels[row][words])
        torch.testing.assert_close(loss, wanted)


def test_an_example_without_a_word_to_learn_has_no_loss_and_no_gradient(model, spec, jsonl):
    batch = batch_of(ROWS[:1], jsonl, models.load(spec), spec)
    batch = Batch(batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, -100))

    loss = model.example_losses(model(batch), batch)
    loss.sum().backward()

    assert loss.tolist() == [0.0]
    assert not model.head.weight.grad.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_private_gradients_equal_micro_batches_of_one(model, spec, jsonl, engine):
    """Texts of unlike lengths, so that padded and unlabelled positions are among them."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch = batch_of(ROWS, jsonl, models.load(spec), spec)
    bound = 0.05

    def losses(some):
        return model.example_losses(model(some), some)

    wanted = {name: torch.zeros_like(p) for name, p in params.items()}
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        single = part(batch, [row])
        alone = Batch(
            *(t[:, :length] for t in (single.input_ids, single.attention_mask)),
            single.labels[:, :length],
        )
        found = torch.autograd.grad(losses(alone).sum(), list(params.values()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        for name, gradient in zip(params, found, strict=True):
            wanted[name] += gradient * min(1.0, bound / float(norm))
    stream = NoiseStream(insecure_key(0, "c"), "digest")
    with PrivateGradient(model, params, bound, 0.0, 1.0, stream, engine=engine) as step:
        step.step([part(batch, [0, 1]), part(batch, [2, 3])], losses, 0)

    for name, p in params.items():
        assert wanted[name].norm() > 0
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7)
    assert chosen(model, params, [engine], batch, losses) == engine


def test_training_learns_the_tags(tag):
    made = tag(steps=40, optimizer=PluginChoice("adamw", {"lr": 0.02}))

    update = train(made)
    after = replace(
        made, action="evaluate", broadcast=Broadcast({**made.broadcast.tensors, **update.tensors})
    )

    assert update.num_examples == 4
    assert evaluate(after).metrics["entity_f1"] == 1.0
    assert evaluate(replace(made, action="evaluate")).metrics["entity_f1"] < 1.0


def test_a_private_round_trains_tags_with_noise_and_says_nothing_of_them(tag):
    privacy = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, insecure_seed=1)

    update = train(tag(privacy=privacy))

    assert update.metrics == {}
    assert update.spends[0].unit == "example"
    assert all(tensor.isfinite().all() for tensor in update.tensors.values())


def test_scores_are_what_one_counts_by_hand(constant):
    found = evaluate(constant(0.0, 0.0, 0.0, 1.0))  # always B-DOG

    # 11 words: 5 O, 2 B-CAT, 2 I-CAT, 2 B-DOG; 11 entities are predicted, 2 of 4 are found
    assert found.num_examples == 4
    assert found.metrics["accuracy"] == 2 / 11
    assert found.metrics["macro_f1"] == pytest.approx((2 * 2 / (11 + 2)) / 4)
    assert found.metrics["entity_precision"] == 2 / 11
    assert found.metrics["entity_recall"] == 2 / 4
    assert found.metrics["entity_f1"] == pytest.approx(2 * 2 / (11 + 4))
    assert found.label_accuracy == {"O": 0.0, "B-CAT": 0.0, "I-CAT": 0.0, "B-DOG": 1.0}
    partition = math.log(3 + math.e)
    losses = [partition, partition - 1 / 5, partition - 1 / 2, partition]  # each over its words
    assert found.metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_a_word_that_was_cut_off_counts_as_outside(constant, spec):
    short = replace(spec, max_length=4)  # two words between the special tokens

    found = evaluate(constant(0.0, 0.0, 0.0, 1.0, model=short))

    # of the words that are seen, dog at place 1 and dog at place 0 are right; O beyond the end too
    assert found.metrics["entity_recall"] == 2 / 4
    assert found.metrics["accuracy"] == (2 + 2) / 11


def test_tags_that_mark_no_entities_are_scored_as_words(constant, spec):
    rows = [{"tokens": ["the", "cat"], "tags": ["DET", "NOUN"]}]
    plain = replace(spec, labels=("DET", "NOUN", "VERB", "X"))

    found = evaluate(constant(0.0, 1.0, 0.0, 0.0, rows=rows, model=plain))

    assert found.metrics.keys() == {"accuracy", "macro_f1", "loss"}
    assert found.metrics["accuracy"] == 0.5


def test_a_task_of_some_tags_scores_the_words_that_have_them(constant):
    dogs = ("O", "B-DOG")
    made = constant(0.0, 9.0, 9.0, 1.0, labels=dogs)  # cats are not in the softmax

    found = evaluate(replace(made, data=replace(made.data, labels=dogs)))

    assert found.num_examples == 4
    assert found.metrics["accuracy"] == 2 / 7
    assert found.label_accuracy == {"O": 0.0, "B-DOG": 1.0}
    assert found.metrics["entity_recall"] == 1.0
    assert math.isfinite(found.metrics["loss"])


def test_words_of_other_tasks_teach_a_task_nothing(tag):
    """However the words that are left out are tagged, the update is the same, bit for bit."""
    dogs = ("O", "B-DOG")
    other = [{**row, "tags": [t.replace("B-CAT", "I-CAT") for t in row["tags"]]} for row in ROWS]
    renamed = [
        {**row, "tags": ["B-CAT" if t == "I-CAT" else t for t in row["tags"]]} for row in other
    ]
    made = [tag(rows=rows, labels=dogs) for rows in (ROWS, [*renamed])]

    one, two = (
        train(replace(a, data=replace(a.data, labels=dogs), client=f"c{i}", seed=3))
        for i, a in enumerate(made)
    )

    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[n], t) for n, t in two.tensors.items())


def test_no_word_to_score_is_refused(constant):
    made = constant(0.0, 0.0, 0.0, 0.0, rows=[ROWS[0]])

    with pytest.raises(NothingToScore, match="no example of the asked labels"):
        evaluate(replace(made, data=replace(made.data, labels=("B-DOG",))))


def test_a_decoder_tags_words_too(tag, tiny_decoder):
    spec = ModelSpec(str(tiny_decoder), "token-classification", labels=LABELS, max_length=32)

    update = train(tag(model=spec))

    assert update.tensors["head.weight"].shape == (4, 32)
    assert "model.layers" not in "".join(update.tensors)
