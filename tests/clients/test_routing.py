"""Which task an input is of, by the frozen base model's features."""

import pytest
import torch

from clients import data
from clients.assignment import ModelSpec
from clients.routing import Router, embedded, router


@pytest.fixture
def spec(tiny_encoder):
    return ModelSpec(str(tiny_encoder), "classification", labels=("a", "b", "c"), max_length=16)


def test_an_input_goes_to_the_task_of_the_most_similar_mean():
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    chooser = Router(means, torch.tensor([0, 1, 0]))
    inputs = torch.tensor([[9.0, 1.0], [0.1, 0.2], [-5.0, 1.0]])
    assert chooser.route(inputs, known=2).tolist() == [0, 1, 0]


def test_a_task_that_is_to_come_gets_no_input():
    chooser = Router(torch.eye(2), torch.tensor([0, 1]))
    assert chooser.route(torch.tensor([[0.0, 1.0]]), known=1).tolist() == [0]


def test_the_means_are_of_each_tasks_classes_and_of_length_one(spec):
    texts = [("the cat sings", 0), ("a dog sings", 0), ("private data", 1), ("rank", 2)]
    rows = [data.Example(text, label=label) for text, label in texts]
    made = router(spec, [rows[:3], rows[3:]])

    assert made.tasks.tolist() == [0, 0, 1]
    assert torch.allclose(made.means.norm(dim=1), torch.ones(3))
    mean = embedded(spec, rows[:2]).mean(dim=0)
    assert torch.allclose(made.means[0], mean / mean.norm(), atol=1e-6)


def test_features_are_in_the_order_of_the_examples(spec):
    rows = [data.Example(t, label=0) for t in ("a much longer text of many words", "rank", "a dog")]
    together = embedded(spec, rows)
    for row, one in zip(rows, together, strict=True):
        assert torch.allclose(embedded(spec, [row])[0], one, atol=1e-5)
