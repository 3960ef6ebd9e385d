import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clients import data
from clients.assignment import ModelSpec
from clients.data import Example

MODEL = ModelSpec(id="m", kind="classification", labels=("int", "float", "str"), max_length=8)
CAUSAL = ModelSpec(id="m", kind="causal-lm", max_length=12)
WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "<user>", "<bot>", "\n"]
WORDS += [f"w{i}" for i in range(40)]
CHAT = (
    "{% for m in messages %}<{{ 'user' if m.role == 'user' else 'bot' }}> {{ m.content }}"
    "{% if m.role == 'assistant' %} [EOS]{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def build_tokenizer(chat_template=None, template=None, **special):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template[0],
            pair=template[1],
            special_tokens=[(word, i) for i, word in enumerate(WORDS[:6])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", chat_template=chat_template, **special
    )


def ids(text):
    return [WORDS.index(word) for word in text.split()]


BERT = build_tokenizer(
    template=("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"), pad_token="[PAD]", eos_token="[SEP]"
)
PLAIN = build_tokenizer(eos_token="[EOS]", pad_token="[PAD]")
WITH_BOS = build_tokenizer(
    template=("[BOS] $A", "[BOS] $A $B"), bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]"
)
CHATTING = build_tokenizer(CHAT, eos_token="[EOS]", pad_token="[PAD]")


def tokens(example, tokenizer=PLAIN, model=CAUSAL):
    (encoded,) = data.encode([example], tokenizer, model)
    return encoded.input_ids.tolist(), encoded.labels.tolist()


def test_classification_takes_special_tokens_and_pairs_in_order():
    examples = [Example("w1", "w2", 2), Example("w3", label=0), Example("w4", "w5 w6", 1)]
    encoded = data.encode(examples, BERT, MODEL)
    assert [e.input_ids.tolist() for e in encoded] == [
        ids("[CLS] w1 [SEP] w2 [SEP]"),
        ids("[CLS] w3 [SEP]"),
        ids("[CLS] w4 [SEP] w5 w6 [SEP]"),
    ]
    assert [e.labels.item() for e in encoded] == [2, 0, 1]


def test_classification_keeps_its_last_special_token_when_truncated():
    text = " ".join(f"w{i}" for i in range(20))
    assert tokens(Example(text, label=1), BERT, MODEL)[0] == ids("[CLS] w0 w1 w2 w3 w4 w5 [SEP]")


def test_plain_text_is_learned_whole_with_its_end():
    found = tokens(Example("w1 w2"))
    assert found == (ids("w1 w2 [EOS]"), ids("w1 w2 [EOS]"))


def test_only_the_completion_is_learned():
    found = tokens(Example(prompt="w1 w2", completion="w3 w4"))
    assert found == (ids("w1 w2 w3 w4 [EOS]"), [-100, -100, *ids("w3 w4 [EOS]")])


def test_a_beginning_of_sequence_is_added_once_and_not_learned():
    found = tokens(Example(prompt="w1", completion="w2"), WITH_BOS)
    assert found == (ids("[BOS] w1 w2 [EOS]"), [-100, -100, *ids("w2 [EOS]")])
    found = tokens(Example("w1"), WITH_BOS)
    assert found == (ids("[BOS] w1 [EOS]"), [-100, *ids("w1 [EOS]")])


def test_a_chat_template_writes_the_turns_and_ends_the_answer_once():
    found = tokens(Example(prompt="w1", completion="w2 w3"), CHATTING)
    assert found == (ids("<user> w1 <bot> w2 w3 [EOS]"), [-100] * 3 + ids("w2 w3 [EOS]"))


def test_a_chat_template_leaves_plain_text_alone():
    assert tokens(Example("w1"), CHATTING)[0] == ids("w1 [EOS]")


def test_a_chat_template_that_does_not_end_its_answer_gets_an_end():
    endless = build_tokenizer(CHAT.replace(" [EOS]", ""), eos_token="[EOS]")
    found = tokens(Example(prompt="w1", completion="w2"), endless)
    assert found == (ids("<user> w1 <bot> w2 [EOS]"), [-100] * 3 + ids("w2 [EOS]"))


def test_a_chat_template_that_opens_answers_otherwise_still_masks_the_prompt():
    thinking = build_tokenizer(CHAT.replace("<bot> {% endif %}", "<bot> w39 {% endif %}"))
    found = tokens(Example(prompt="w1", completion="w2"), thinking)
    assert found == (ids("<user> w1 <bot> w39 w2"), [-100] * 4 + ids("w2"))


def test_a_long_prompt_loses_its_beginning_and_keeps_the_completion():
    prompt = " ".join(f"w{i}" for i in range(30))
    found, labels = tokens(Example(prompt=prompt, completion="w30 w31"), WITH_BOS)
    assert found == ids("[BOS] w22 w23 w24 w25 w26 w27 w28 w29 w30 w31 [EOS]")
    assert labels == [-100] * 9 + ids("w30 w31 [EOS]")


def test_a_long_completion_leaves_half_to_the_prompt():
    long = " ".join(f"w{i}" for i in range(30))
    found, labels = tokens(Example(prompt=long, completion=long))
    assert found == ids("w24 w25 w26 w27 w28 w29 w0 w1 w2 w3 w4 w5")
    assert labels == [-100] * 6 + ids("w0 w1 w2 w3 w4 w5")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30), st.integers(1, 30), st.integers(1, 20), st.sampled_from([PLAIN, WITH_BOS])
)
def test_truncation_keeps_the_limit_and_always_a_target(prompt, completion, limit, tokenizer):
    example = Example(prompt="w1 " * prompt, completion="w2 " * completion)
    model = ModelSpec(id="m", kind="causal-lm", max_length=limit)
    found, labels = tokens(example, tokenizer, model)
    assert 1 <= len(found) <= limit
    learned = [token for token, label in zip(found, labels, strict=True) if label != -100]
    assert [label for label in labels if label != -100] == learned
    assert learned[0] == ids("w2")[0]


def test_a_batch_is_padded_on_the_right_to_its_longest():
    encoded = data.encode([Example("w1"), Example("w2 w3 w4")], PLAIN, CAUSAL)
    batch = data.collate(encoded, data.padding_id(PLAIN))
    assert batch.input_ids.tolist() == [ids("w1 [EOS] [PAD] [PAD]"), ids("w2 w3 w4 [EOS]")]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[*ids("w1 [EOS]"), -100, -100], ids("w2 w3 w4 [EOS]")]
    assert len(batch) == 2


def test_a_batch_of_classes_has_one_label_an_example():
    encoded = data.encode([Example("w1", label=2), Example("w2 w3", label=0)], BERT, MODEL)
    batch = data.collate(encoded, 0).to("cpu")
    assert batch.labels.tolist() == [2, 0]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_no_examples_give_an_empty_batch():
    assert data.encode([], PLAIN, CAUSAL) == []
    batch = data.collate([], 0)
    assert len(batch) == 0
    assert {tuple(t.shape) for t in (batch.input_ids, batch.attention_mask)} == {(0, 1)}


@pytest.mark.parametrize(
    ("special", "token"),
    [({"pad_token": "[PAD]", "eos_token": "[EOS]"}, 0), ({"eos_token": "[EOS]"}, 3), ({}, 0)],
)
def test_a_tokenizer_without_padding_pads_with_its_end(special, token):
    assert data.padding_id(build_tokenizer(**special)) == token
