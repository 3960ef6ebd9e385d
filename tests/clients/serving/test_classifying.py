"""Texts of different adapters, heads and poolings in one batch get the labels they get alone."""

import pytest
import torch

from clients.assignment import ModelSpec
from clients.serving.bank import Bank
from clients.serving.changes import Unservable, changes_of
from clients.serving.classifying import Classifier, Head, Text
from clients.task_model import TaskModel
from clients.tokens import Batch
from tests.clients.serving.conftest import attached

TEXTS = ((2, 10, 11, 12, 13, 3), (2, 40, 3), (2, 21, 22, 23, 3))
LABELS = (("a", "b"), ("x", "y", "z"), ("O", "B-T", "I-T", "B-U"))
POOLINGS = ("mean", "cls", "none")


@pytest.fixture
def bank(encoder):
    made = Bank(encoder.backbone)
    yield made
    made.close()


def alone(encoder, kind, seed, row):
    """Return the logits of a text by weft's own task model, the adapter's tensors and its head."""
    pooling = POOLINGS[row]
    task = "token-classification" if pooling == "none" else "classification"
    spec = ModelSpec(
        encoder.spec.id, task, labels=LABELS[row], pooling="auto" if pooling == "none" else pooling
    )
    adapter, model, tensors = attached(encoder.backbone, kind, seed, ["query", "value"])
    whole = TaskModel(model, spec).eval()
    torch.nn.init.normal_(whole.head.weight)
    torch.nn.init.normal_(whole.head.bias)
    ids = torch.tensor([TEXTS[row]])
    with torch.no_grad():
        logits = whole(Batch(ids, torch.ones_like(ids), torch.zeros(1)))
    head = whole.head_tensors()
    adapter.detach(model)
    return logits[0], tensors, (head["head.weight"], head["head.bias"])


def test_a_mixed_batch_labels_each_text_as_its_adapter_does_alone(encoder, bank):
    classifier = Classifier(encoder.backbone, bank, 0, largest=8, batch_tokens=64)
    asked, wanted = [], []
    for row, kind in enumerate(("rank 2", "dora", "biases")):
        logits, tensors, (weight, bias) = alone(encoder, kind, row, row)
        slot = bank.put(changes_of(encoder.backbone, tensors))
        allowed = (True,) * len(LABELS[row])
        classifier.put_head(slot, Head(weight, bias, allowed, POOLINGS[row]))
        asked.append((row, Text(TEXTS[row], slot, (1, 3) if row == 2 else ())))
        wanted.append(logits[[1, 3]] if row == 2 else logits[None])
    for (key, found), logits in zip(classifier.admit(asked), wanted, strict=True):
        expected = torch.softmax(logits, -1)
        torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=1e-5)
        assert key == asked[key][0]


def test_a_label_that_was_never_learned_has_no_chance(encoder, bank):
    classifier = Classifier(encoder.backbone, bank, 0, largest=8, batch_tokens=64)
    slot = bank.put({})
    weight = torch.randn(3, 32)
    classifier.put_head(slot, Head(weight, torch.tensor([0.0, 9, 0]), (True, False, True), "mean"))
    ((_, found),) = classifier.admit([(0, Text(TEXTS[0], slot))])
    assert found.probabilities[0, 1] == 0
    assert float(found.probabilities.sum()) == pytest.approx(1.0)


def test_a_dropped_head_leaves_the_others_as_they_are(encoder, bank):
    classifier = Classifier(encoder.backbone, bank, 0, largest=8, batch_tokens=64)
    slots = [bank.put({}) for _ in range(2)]
    for slot, size in zip(slots, (2, 5), strict=True):
        head = Head(torch.randn(size, 32), torch.zeros(size), (True,) * size, "cls")
        classifier.put_head(slot, head)
    ((_, before),) = classifier.admit([(0, Text(TEXTS[0], slots[0]))])
    classifier.drop_head(slots[1])
    ((_, after),) = classifier.admit([(0, Text(TEXTS[0], slots[0]))])
    torch.testing.assert_close(before.probabilities, after.probabilities)


def test_a_head_of_another_width_is_refused(encoder, bank):
    classifier = Classifier(encoder.backbone, bank, 0, largest=8, batch_tokens=64)
    with pytest.raises(Unservable, match="has 32 inputs"):
        classifier.put_head(1, Head(torch.zeros(2, 31), torch.zeros(2), (True, True), "cls"))


def test_a_batch_holds_so_many_texts_and_tokens_and_always_one(encoder, bank):
    classifier = Classifier(encoder.backbone, bank, 0, largest=2, batch_tokens=8)
    short, long = Text((1, 2), 0), Text(tuple(range(1, 20)), 0)
    assert classifier.fits([], long)
    assert classifier.fits([short], short)
    assert not classifier.fits([short, short], short)
    assert not classifier.fits([short], long)
