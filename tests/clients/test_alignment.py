"""Each word's first piece, with tokenizers of several kinds."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from clients import data
from clients.alignment import aligned, refuse_blind
from clients.assignment import ModelSpec
from clients.data import Example
from clients.tags import joined, words_of
from clients.weights import UnsupportedBase

LABELS = ("O", "B-A", "I-A")


def tagged(*tokens):
    text, words = joined(tokens)
    return Example(text, words=words, tags=tuple(range(len(tokens))))


@pytest.fixture(params=["tiny_encoder", "tiny_decoder"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def test_the_first_piece_of_each_word_has_its_tag_and_no_other_piece_has_one(tokenizer):
    """Decoding from a word's piece to the next word's must give back the word."""
    tokens = ("the", "cat", "xyzq", "sings", "5mg", "é")
    example = tagged(*tokens)

    [found] = aligned([example], tokenizer, 64)

    assert None not in found.places
    assert found.places == sorted(set(found.places))
    ends = [*found.places[1:], len(found.input_ids)]
    for word, start, end in zip(tokens[:-1], found.places, ends, strict=False):
        said = tokenizer.decode(found.input_ids[start:end], skip_special_tokens=True)
        assert said.replace(" ", "").replace("##", "") == word
    targets = found.targets(example.tags)
    assert [t for t in targets if t != -100] == list(example.tags)
    assert [targets[place] for place in found.places] == list(example.tags)


def test_words_without_blanks_between_them_have_pieces_of_their_own(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    text = "cat, (dog)"
    example = Example(text, words=words_of(text), tags=(1, 0, 0, 1, 0))

    [found] = aligned([example], tokenizer, 64)

    assert tokenizer.convert_ids_to_tokens(found.input_ids) == [
        *("[CLS]", "cat", ",", "(", "dog", ")", "[SEP]")
    ]
    assert found.places == [1, 2, 3, 4, 5]


def test_a_word_beyond_the_end_has_no_piece(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)

    [found] = aligned([tagged("cat", "xy", "dog")], tokenizer, 4)

    assert tokenizer.convert_ids_to_tokens(found.input_ids) == ["[CLS]", "cat", "x", "[SEP]"]
    assert found.places == [1, 2, None]


def test_a_word_of_which_the_tokenizer_makes_nothing_has_no_piece(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)

    [found] = aligned([tagged("cat", "\u200b", "dog")], tokenizer, 16)

    assert found.places == [1, None, 2]
    assert found.targets((1, 2, 0)) == [-100, 1, 0, -100]


def test_a_piece_of_two_words_stands_for_the_first():
    class Whole:
        is_fast = True

        def __call__(self, texts, **options):
            return {"input_ids": [[1, 2]], "offset_mapping": [[(0, 3), (3, 4)]]}

    example = Example("3.5%", words=words_of("3.5%"), tags=(1, 2, 2, 0))

    assert aligned([example], Whole(), 8)[0].places == [0, None, None, 1]


def test_a_tokenizer_that_cannot_say_where_its_pieces_stand_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedBase, match="which a Slow does not say; use a base model with"):
        refuse_blind(Slow())


def test_tags_are_encoded_and_padded_with_what_no_loss_counts(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    spec = ModelSpec(str(tiny_encoder), "token-classification", labels=LABELS, max_length=16)

    encoded = data.encode([tagged("cat", "dog"), tagged("the", "xy", "cat")], tokenizer, spec)
    batch = data.collate(encoded, data.padding_id(tokenizer))

    assert batch.labels.tolist() == [[-100, 0, 1, -100, -100, -100], [-100, 0, 1, -100, 2, -100]]
    assert batch.attention_mask.sum(1).tolist() == [4, 6]
    assert data.encode([], tokenizer, spec) == []
