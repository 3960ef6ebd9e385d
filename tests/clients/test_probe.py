from __future__ import annotations

from pathlib import Path

import pytest

from clients.assignment import ModelSpec
from clients.data import Example
from clients.probe import frozen_probe
from clients.tags import words_of

LABELS = ("beasts", "machines")
TEXTS = (
    ["cat cat dog", "dog cat dog", "dog dog dog", "cat dog cat", "dog cat"],
    ["model adapter rank", "adapter rank rank", "model model rank", "rank adapter"],
)


@pytest.fixture
def spec(tiny_encoder: Path) -> ModelSpec:
    return ModelSpec(str(tiny_encoder), "classification", labels=LABELS, max_length=16)


def _examples(*labels: int) -> list[Example]:
    return [Example(text=text, label=label) for label in labels for text in TEXTS[label]]


def test_a_probe_tells_separable_texts_apart(spec: ModelSpec) -> None:
    both = _examples(0, 1)
    assert frozen_probe(spec, both, both)[0] == 1.0


def test_the_majority_is_the_training_sets_most_frequent_label(spec: ModelSpec) -> None:
    both = _examples(0, 1)  # five beasts, four machines
    assert frozen_probe(spec, both, _examples(1))[1] == 0.0
    assert frozen_probe(spec, both, both)[1] == pytest.approx(5 / 9)


def test_a_probe_of_words_is_fitted_and_scored_on_each_word_that_is_seen(spec: ModelSpec) -> None:
    tags = ModelSpec(spec.id, "token-classification", labels=LABELS, max_length=5)
    rows = ("cat model dog", "rank dog", "adapter cat dog model rank")  # three words are seen
    kinds = [tuple(int(word not in ("cat", "dog")) for word in row.split()) for row in rows]
    examples = [
        Example(row, words=words_of(row), tags=tag) for row, tag in zip(rows, kinds, strict=True)
    ]

    accuracy, majority = frozen_probe(tags, examples, examples)

    assert accuracy == 1.0
    assert majority == 5 / 8  # five beasts among 3 + 2 + 3 words


def test_a_probe_is_deterministic_and_leaves_the_base_frozen(spec: ModelSpec) -> None:
    both = _examples(0, 1)
    assert frozen_probe(spec, both, both) == frozen_probe(spec, both, both)
