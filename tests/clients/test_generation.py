"""Answers of a causal model, and how like the right ones they are."""

import random

import pytest
import torch

from clients import data, models
from clients.assignment import ModelSpec
from clients.generation import NoPrompt, answers, exact_match, rouge_l


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words():
    # Lin 2004, section 3.2: "police kill the gunman" and "the gunman kill police" share two of
    # four words in order with "police killed the gunman", the first one three
    wanted = "police killed the gunman"
    assert rouge_l("police kill the gunman", wanted) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", wanted) == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("answer", "wanted", "value"),
    [("a b c", "a b c", 1.0), ("", "a", 0.0), ("", "...", 1.0), ("A, b!", "a b c d", 2 / 3)],
)
def test_rouge_l_at_its_ends(answer, wanted, value):
    assert rouge_l(answer, wanted) == pytest.approx(value)


def test_rouge_l_finds_the_longest_of_all_common_subsequences():
    draw = random.Random(0)

    def subsequences(words):
        return {
            tuple(w for i, w in enumerate(words) if kept >> i & 1)
            for kept in range(1 << len(words))
        }

    for _ in range(50):
        ours, theirs = ([draw.choice("abc") for _ in range(draw.randint(1, 7))] for _ in range(2))
        common = max(len(one) for one in subsequences(ours) & subsequences(theirs))
        value = rouge_l(" ".join(ours), " ".join(theirs))
        assert value == pytest.approx(2 * common / (len(ours) + len(theirs)))


def test_an_exact_match_heeds_neither_case_nor_white_space():
    assert exact_match("Yes,\n sir", "yes, sir") == 1
    assert exact_match("yes sir", "yes, sir") == 0


@pytest.fixture
def causal(tiny_decoder):
    spec = ModelSpec(str(tiny_decoder), "causal-lm", max_length=48)
    return spec, models.load(spec)


def encoded(causal, *pairs):
    spec, base = causal
    rows = [data.Example(prompt=prompt, completion=completion) for prompt, completion in pairs]
    return data.encode(rows, base.tokenizer, spec)


def test_an_answer_is_what_the_model_says_token_by_token_with_any_padding(causal):
    _, base = causal
    pairs = [("the cat", "sings"), ("a much longer prompt about the round", "ends")]
    both = encoded(causal, *pairs)
    together = answers(base.backbone, base.tokenizer, both, most=6)
    for one, said in zip(both, together, strict=True):
        ids = one.input_ids[one.labels == -100].tolist()
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                token = int(base.backbone(torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)
                if token == base.tokenizer.eos_token_id:
                    break
        assert said == base.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_text_without_a_prompt_has_no_answer(causal):
    spec, base = causal
    texts = data.encode([data.Example("the cat sings")], base.tokenizer, spec)
    bare = [data.Encoded(one.input_ids, one.input_ids) for one in texts]
    with pytest.raises(NoPrompt, match="without a prompt"):
        answers(base.backbone, base.tokenizer, bare, most=2)
