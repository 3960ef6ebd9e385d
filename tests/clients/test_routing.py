"""Which task an input is of, by the frozen base model's features."""

import pytest
import torch

from clients import data
from clients.assignment import DataSpec, ModelSpec
from clients.evaluate import answer_scores, evaluate, label_scores, predicted, tag_scores
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


def test_of_a_prompt_with_its_completion_the_prompt_is_looked_at(tiny_decoder):
    spec = ModelSpec(str(tiny_decoder), "causal-lm", max_length=32)
    rows = [data.Example(prompt="say cat", completion=word) for word in (" cat", " thread now")]
    one, two = embedded(spec, rows)
    [other] = embedded(spec, [data.Example(prompt="what weaves", completion=" cat")])
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)
    assert len(embedded(spec, [data.Example("a text by itself")])) == 1


def test_texts_without_a_class_have_one_mean_a_task(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "token-classification", labels=("O", "B-X"), max_length=16)
    rows = [data.Example("the cat", words=((0, 3), (4, 7)), tags=(0, 1))] * 2
    made = router(spec, [rows, rows[:1]])
    assert made.tasks.tolist() == [0, 1]
    assert torch.allclose(made.means[0], made.means[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["classification", "token-classification", "causal-lm"])
def test_answers_one_by_one_score_as_an_evaluation_of_all_does(
    kind, assign, tiny_encoder, tiny_decoder
):
    rows = {
        "classification": [{"text": f"{w} sings", "label": w} for w in ("cat", "dog", "a") * 3],
        "token-classification": [
            {"tokens": ["the", w, "sings"], "tags": ["a", w, "a"]} for w in ("cat", "dog") * 3
        ],
        "causal-lm": [{"prompt": f"say {w}", "completion": w} for w in ("cat", "dog")],
    }[kind]
    causal = kind == "causal-lm"
    labels = () if causal else ("cat", "dog", "a")
    model = tiny_decoder if causal else tiny_encoder
    spec = ModelSpec(str(model), kind, labels=labels, max_length=16)
    asked = assign(rows=rows, model=spec, action="evaluate", answer_tokens=4 if causal else 0)
    examples = data.examples(DataSpec(asked.data.uri), spec)

    said = predicted(asked, examples)

    scores = {
        "classification": lambda: label_scores(
            torch.tensor(said), torch.tensor([one.label for one in examples]), labels
        )[0],
        "token-classification": lambda: tag_scores(examples, said, labels)[0],
        "causal-lm": lambda: answer_scores(examples, said),
    }[kind]()
    metrics = evaluate(asked).metrics
    assert len(said) == len(examples)
    assert scores == {name: metrics[name] for name in scores}
    assert len(scores) == 2
