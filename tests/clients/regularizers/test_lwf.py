"""LwF's divergence: by hand, in the right direction, over the old labels alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from clients.regularizers import Beginning
from clients.regularizers.lwf import LwF

START = {"q.lora_A.weight": torch.ones(2, 3), "head.weight": torch.ones(4, 3)}

NO_LABELS = torch.zeros(1, dtype=torch.int64)


@dataclass
class Batch:
    taught: dict[str, torch.Tensor]
    labels: torch.Tensor


def remembered(method, known=(0, 1, 2)):
    return method.begin(Beginning(START, first=False, known=known), {})


def loss(method, old, new, known=(0, 1, 2), labels=NO_LABELS):
    batch = Batch({"outputs": old}, labels)
    return method.example_loss(None, batch, new, remembered(method, known))


def test_it_is_the_divergence_of_the_learner_from_its_teacher_times_the_temperature_squared():
    old, new = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    p, q = torch.softmax(old / 2, 1), torch.softmax(new / 2, 1)
    by_hand = 3.0 * 4 * (p * (p / q).log()).sum()

    assert loss(LwF(weight=3.0), old, new).tolist() == pytest.approx([float(by_hand)], rel=1e-5)


def test_its_direction_is_the_papers():
    sure, torn = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    method = LwF(temperature=1.0)
    p = torch.softmax(sure, 1)
    forward = (p * (p * 3).log()).sum()

    assert loss(method, sure, torn) == pytest.approx(float(forward), rel=1e-5)
    assert loss(method, torn, sure) != pytest.approx(float(forward), rel=1e-2)


def test_the_gradient_pulls_the_learners_distribution_to_the_teachers():
    old = torch.tensor([[2.0, 0.0, -1.0]])
    new = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    loss(LwF(), old, new).sum().backward()
    expected = 2.0 * (torch.softmax(new.detach() / 2, 1) - torch.softmax(old / 2, 1))
    assert torch.allclose(new.grad, expected, atol=1e-6)


def test_labels_that_the_start_did_not_know_have_no_part_in_it():
    old, new = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
    value = loss(LwF(), old, new, known=(1, 3))
    value.sum().backward()
    other = new.detach().clone()
    other[:, [0, 2]] += 100

    assert torch.equal(loss(LwF(), old, other, known=(1, 3)), value.detach())
    assert not new.grad[:, [0, 2]].any()
    assert new.grad[:, [1, 3]].any()


def test_of_a_language_model_it_is_the_mean_over_what_is_learned_where_it_is_predicted():
    old, new = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, -100, -100]])
    p, q = torch.softmax(old / 2, -1), torch.softmax(new / 2, -1)
    each = 4 * (p * (p / q).log()).sum(-1)
    by_hand = torch.stack([(each[0, 1] + each[0, 2]) / 2, each[1, 0]])

    found = loss(LwF(), old, new, (), labels)

    assert torch.allclose(found, by_hand, rtol=1e-4)


def test_of_tags_it_is_the_mean_over_the_tokens_that_are_learned_and_the_labels_it_knew():
    old, new = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    labels = torch.tensor([[-100, 3, 1]])
    p, q = (torch.softmax(z[..., [0, 2]] / 2, -1) for z in (old, new))
    each = 4 * (p * (p / q).log()).sum(-1)

    found = loss(LwF(), old, new, (0, 2), labels)

    assert torch.allclose(found, (each[:, 1] + each[:, 2]) / 2, rtol=1e-4)


def test_a_learner_that_is_its_teacher_loses_nothing():
    same = torch.randn(3, 3)
    assert loss(LwF(), same, same.clone()).abs().max() < 1e-6


def test_on_a_first_task_it_does_nothing():
    memory = LwF().begin(Beginning(START), {})
    assert memory == {}
    assert LwF().teacher(memory) == {}
    assert LwF().example_loss(None, Batch({}, NO_LABELS), torch.randn(1, 4), memory) is None


def test_the_teacher_is_the_runs_start_and_is_forgotten_with_it():
    memory = remembered(LwF())
    found = LwF().teacher(memory)
    assert found.keys() == START.keys()
    assert all(torch.equal(found[name], START[name]) for name in START)
    assert LwF().consolidate(START, memory) == {}
