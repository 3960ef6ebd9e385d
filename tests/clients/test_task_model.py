"""The task model: pooling, head, and per-example losses."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clients import models
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.task_model import TaskModel

SPEC = ModelSpec(id="none", kind="classification", labels=("x", "y", "z"), pooling="mean")


class Canned(nn.Module):
    """A backbone whose hidden states are given."""

    def __init__(self, hidden: torch.Tensor, model_type: str = "bert") -> None:
        super().__init__()
        size = SimpleNamespace(hidden_size=hidden.shape[-1])
        self.config = SimpleNamespace(model_type=model_type, get_text_config=lambda: size)
        self.hidden = hidden

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden, logits=self.hidden)


def batch_of(mask: list[list[int]], labels: torch.Tensor | None = None) -> Batch:
    attention = torch.tensor(mask)
    given = torch.zeros(len(mask), dtype=torch.long) if labels is None else labels
    return Batch(torch.ones_like(attention), attention, given)


def pooled(pooling: str, mask: list[list[int]], model_type: str = "bert") -> list[float]:
    """Pool the hidden states 1, 2, 3 of each sequence."""
    hidden = torch.tensor([[[1.0], [2.0], [3.0]]]).expand(len(mask), 3, 1)
    model = TaskModel(Canned(hidden, model_type), replace(SPEC, pooling=pooling))
    model.write_head({"head.weight": torch.ones(3, 1), "head.bias": torch.zeros(3)})
    return model(batch_of(mask))[:, 0].tolist()


def test_mean_pooling_leaves_padding_out():
    assert pooled("mean", [[1, 1, 1], [1, 1, 0], [0, 1, 1]]) == [2.0, 1.5, 2.5]


def test_cls_pooling_takes_the_first_token():
    assert pooled("cls", [[1, 1, 1], [1, 0, 0]]) == [1.0, 1.0]


def test_last_pooling_takes_the_last_real_token_on_either_side_of_padding():
    assert pooled("last", [[1, 1, 1], [1, 1, 0], [0, 1, 1]]) == [3.0, 2.0, 3.0]


def test_auto_pooling_is_the_mean_for_encoders_and_the_last_token_for_decoders():
    assert pooled("auto", [[1, 1, 1]], "bert") == [2.0]
    assert pooled("auto", [[1, 1, 1]], "llama") == [3.0]


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'mean', 'cls' or 'last', got 'max'"):
        pooled("max", [[1]])


def test_padding_does_not_change_the_logits(tiny_encoder, tiny_decoder):
    for folder in (tiny_encoder, tiny_decoder):
        spec = replace(SPEC, id=str(folder), pooling="auto")
        model = TaskModel(models.load(spec).backbone, spec)
        short = torch.tensor([[5, 9, 11]])
        padded = torch.tensor([[5, 9, 11, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        with torch.no_grad():
            alone = model(Batch(short, torch.ones_like(short), torch.zeros(1).long()))
            filled = model(Batch(padded, mask, torch.zeros(1).long()))
        torch.testing.assert_close(alone, filled, rtol=1e-4, atol=1e-5)


def test_the_head_starts_small_without_bias_and_from_the_global_seed():
    hidden = torch.zeros(1, 1, 4000)
    torch.manual_seed(1)
    first = TaskModel(Canned(hidden), SPEC).head_tensors()
    torch.manual_seed(1)
    again = TaskModel(Canned(hidden), SPEC).head_tensors()
    assert torch.equal(first["head.weight"], again["head.weight"])
    assert first["head.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["head.bias"], torch.zeros(3))


def test_the_head_is_float32_over_a_half_precision_base():
    model = TaskModel(Canned(torch.ones(1, 2, 4, dtype=torch.bfloat16)), SPEC)
    assert model(batch_of([[1, 1]])).dtype == torch.float32


def test_head_tensors_are_copies_and_head_parameters_are_live():
    model = TaskModel(Canned(torch.ones(1, 2, 4)), SPEC)
    copies, live = model.head_tensors(), model.head_parameters()
    assert copies.keys() == live.keys() == {"head.weight", "head.bias"}
    with torch.no_grad():
        live["head.bias"].fill_(5.0)
    assert copies["head.bias"].tolist() == [0.0] * 3
    assert model.head_tensors()["head.bias"].tolist() == [5.0] * 3


def test_a_head_of_another_label_set_is_refused_and_not_half_written():
    model = TaskModel(Canned(torch.ones(1, 2, 4)), SPEC)
    before = model.head_tensors()
    with pytest.raises(ValueError, match=r"head.weight must be \[3, 4\] for the labels x, y, z"):
        model.write_head({"head.bias": torch.ones(3), "head.weight": torch.ones(2, 4)})
    assert torch.equal(model.head_tensors()["head.bias"], before["head.bias"])


def test_a_head_that_is_incomplete_is_refused():
    model = TaskModel(Canned(torch.ones(1, 2, 4)), SPEC)
    with pytest.raises(ValueError, match=r"got \['head.bias'\]"):
        model.write_head({"head.bias": torch.ones(3)})


@pytest.mark.parametrize("labels", [(), ("x",), ("x", "x")])
def test_a_label_set_that_cannot_be_learned_is_refused(labels):
    with pytest.raises(ValueError, match="two or more different labels"):
        TaskModel(Canned(torch.ones(1, 1, 4)), replace(SPEC, labels=labels))


def test_a_causal_model_has_no_head():
    spec = ModelSpec(id="none", kind="causal-lm")
    model = TaskModel(Canned(torch.ones(1, 2, 4), "llama"), spec)
    assert model.head_tensors() == {}
    assert model.head_parameters() == {}
    with pytest.raises(ValueError, match="a causal-lm model has the head none"):
        model.write_head({"head.bias": torch.ones(3)})


def test_classification_losses_are_cross_entropies_by_example():
    model = TaskModel(Canned(torch.ones(2, 1, 4)), SPEC)
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0]])
    losses = model.example_losses(logits, batch_of([[1], [1]], torch.tensor([1, 0])))
    torch.testing.assert_close(losses, torch.tensor([math.log(3.0), math.log(2.0)]))


def test_labels_that_are_not_allowed_take_no_part_in_the_softmax():
    model = TaskModel(Canned(torch.ones(2, 1, 4)), SPEC)
    logits = torch.tensor([[0.0, 9.0, 0.0]], requires_grad=True)
    loss = model.example_losses(
        logits, batch_of([[1]], torch.tensor([2])), allowed=torch.tensor([0, 2])
    )
    torch.testing.assert_close(loss, torch.tensor([math.log(2.0)]))
    loss.sum().backward()
    assert logits.grad[0, 1] == 0.0


def test_causal_losses_are_means_over_each_examples_targets():
    spec = ModelSpec(id="none", kind="causal-lm")
    model = TaskModel(Canned(torch.ones(1, 2, 4), "llama"), spec)
    logits = torch.zeros(3, 4, 2)
    logits[0, 1, 1] = math.log(3.0)  # what precedes the third token says 1 with odds 3
    labels = torch.tensor([[-100, -100, 1, 0], [-100, 0, 0, 0], [-100, -100, -100, -100]])
    batch = Batch(torch.ones(3, 4).long(), torch.ones(3, 4).long(), labels)
    expected = [(math.log(4 / 3) + math.log(2)) / 2, math.log(2), 0.0]
    torch.testing.assert_close(model.example_losses(logits, batch), torch.tensor(expected))
