"""Scores that are checked by hand."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients.assignment import ModelSpec
from clients.evaluate import NothingToScore, evaluate, example_losses
from clients.generation import NoPrompt
from clients.site import Site
from strategies.base import Broadcast

TRUTH = ["cat", "cat", "dog", "dog", "dog", "rank"]
ROWS = [{"text": f"{label} {i}", "label": label} for i, label in enumerate(TRUTH)]


@pytest.fixture
def constant(assign):
    """Return a function that makes an evaluation whose logits are ``bias`` for every text."""

    def make(*bias, rows=ROWS, **changes):
        made = assign(rows, **changes)
        tensors = dict(made.broadcast.tensors)
        tensors["head.weight"] = torch.zeros(4, 32)
        tensors["head.bias"] = torch.tensor(bias)
        return replace(made, action="evaluate", client="tester", broadcast=Broadcast(tensors))

    return make


def test_accuracy_f1_and_loss_are_what_one_counts_by_hand(constant):
    found = evaluate(constant(0.0, 1.0, 0.0, 0.5))  # always 'dog'

    assert (found.client, found.round, found.num_examples) == ("tester", 1, 6)
    assert found.metrics["accuracy"] == 3 / 6
    assert found.metrics["macro_f1"] == pytest.approx((0 + 2 * 3 / (6 + 3) + 0) / 3)
    partition = math.log(2 * math.exp(0) + math.exp(1) + math.exp(0.5))
    expected = partition - (2 * 0.0 + 3 * 1.0 + 1 * 0.5) / 6
    assert found.metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert found.label_accuracy == {"cat": 0.0, "dog": 1.0, "rank": 0.0}


def test_labels_outside_the_softmax_are_not_predicted(constant):
    rows = [row for row in ROWS if row["label"] != "dog"]
    found = evaluate(constant(0.0, 9.0, 0.0, 0.5, rows=rows, labels=("cat", "rank")))

    assert found.label_accuracy == {"cat": 0.0, "rank": 1.0}
    expected = math.log(math.exp(0) + math.exp(0.5)) - 0.5 / 3
    assert found.metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_example_outside_the_softmax_is_wrong_and_leaves_no_loss(constant):
    found = evaluate(constant(0.0, 9.0, 0.0, 0.5, labels=("cat", "rank")))

    assert found.metrics.keys() == {"accuracy", "macro_f1"}
    assert found.label_accuracy == {"cat": 0.0, "dog": 0.0, "rank": 1.0}


def test_examples_can_be_chosen_by_label(constant):
    made = constant(0.0, 1.0, 0.0, 0.0)

    found = evaluate(replace(made, data=replace(made.data, labels=("dog",))))

    assert (found.num_examples, found.metrics["accuracy"]) == (3, 1.0)


def test_no_example_to_score_is_refused(constant):
    made = constant(0.0, 1.0, 0.0, 0.0)

    with pytest.raises(NothingToScore, match="holds no example of the asked labels"):
        evaluate(replace(made, data=replace(made.data, labels=("model",))))


@pytest.mark.parametrize("microbatch", [1, 4])
def test_batches_do_not_change_the_scores(assign, microbatch):
    rows = [{**row, "text": row["text"] + " weaves" * i} for i, row in enumerate(ROWS)]
    whole = evaluate(assign(rows))
    parts = evaluate(assign(rows, microbatch=microbatch))

    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert parts.label_accuracy == whole.label_accuracy


def test_a_personal_head_is_the_one_that_is_scored(constant):
    made = constant(1.0, 0.0, 0.0, 0.0, head="personal")
    own = {"head.weight": torch.zeros(4, 32), "head.bias": torch.tensor([0.0, 0, 0, 1])}
    Site(made.site).store_state(made.run, made.client, 1, own)

    assert evaluate(made).label_accuracy == {"cat": 0.0, "dog": 0.0, "rank": 1.0}
    shared = replace(made, head="train")
    assert evaluate(shared).label_accuracy == {"cat": 1.0, "dog": 0.0, "rank": 0.0}


def test_language_modelling_is_scored_as_transformers_scores_it(assign, tiny_decoder):
    rows = [{"prompt": "the cat", "completion": " sings"}, {"prompt": "a", "completion": "é"}]
    spec = ModelSpec(str(tiny_decoder), "causal-lm", max_length=32)

    found = evaluate(assign(rows, model=spec))

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    nats, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        target = tokenizer(row["completion"], add_special_tokens=False).input_ids
        target.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        nats -= sum(float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(target))
        tokens += len(target)
    assert found.num_examples == 2
    assert found.metrics["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    num_bytes = len(" sings") + 2  # é is two bytes
    expected = nats / math.log(2) / num_bytes
    assert found.metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_single_losses_are_told_of_public_data_alone_and_add_up_to_the_mean(assign):
    asked = assign(action="evaluate")
    with pytest.raises(ValueError, match="public data alone"):
        example_losses(asked)
    found = example_losses(replace(asked, public=True))
    assert sum(found) / len(found) == pytest.approx(evaluate(asked).metrics["loss"], rel=1e-5)


def test_answers_to_texts_are_refused_where_tokens_begin_with_one_that_is_not_learned(
    assign, tiny_decoder, tmp_path
):
    folder = shutil.copytree(tiny_decoder, tmp_path / "begins")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(folder)
    spec = ModelSpec(str(folder), "causal-lm", max_length=32)

    with pytest.raises(NoPrompt, match="a record is a text without a prompt"):
        evaluate(assign([{"text": "the cat sings"}], model=spec, answer_tokens=2))
