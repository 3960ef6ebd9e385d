"""A reservoir is a fair sample of bounded size, and comes back from its bytes as it was."""

from __future__ import annotations

import math

import pytest
import torch

from clients.assignment import ModelSpec
from clients.examples import Example
from clients.reservoir import Kept, NotKept, Reservoir, offered, read, written

MODEL = ModelSpec("m", "classification", labels=("cat", "dog", "rank"))


def examples(count, task=0):
    return [Example(f"{task}-{i}", label=task) for i in range(count)]


def texts(reservoir):
    return [one.example.text for one in reservoir.kept]


def test_each_example_is_kept_with_the_same_probability_whichever_task_it_is_of():
    size, sizes, trials = 10, (30, 20), 600
    counts: dict[str, int] = {}
    for seed in range(trials):
        found = Reservoir()
        for task, count in enumerate(sizes):
            found, _ = offered(found, examples(count, task), (task,), size, 2 * seed + task)
        for text in texts(found):
            counts[text] = counts.get(text, 0) + 1
    n = sum(sizes)
    p = size / n
    assert len(counts) == n
    worst = max(abs(count - trials * p) for count in counts.values())
    assert worst < 3 * math.sqrt(trials * p * (1 - p))
    for task, own in enumerate(sizes):
        found_in = sum(c for text, c in counts.items() if text.startswith(f"{task}-"))
        variance = size * own / n * (1 - own / n) * (n - size) / (n - 1)  # hypergeometric
        assert abs(found_in - trials * size * own / n) < 3 * math.sqrt(trials * variance)


@pytest.mark.parametrize("counts", [(3, 4), (3, 50), (50, 3), (50, 50, 50)])
def test_it_never_holds_more_than_its_size_and_all_while_there_is_room(counts):
    found, total = Reservoir(), 0
    for task, count in enumerate(counts):
        found, places = offered(found, examples(count, task % 3), (), 8, task)
        total += count
        assert len(found.kept) == min(8, total)
        assert found.offered == total
        assert len(set(texts(found))) == len(found.kept)
        assert all(
            found.kept[place].example.text == f"{task % 3}-{i}" for place, i in places.items()
        )


def test_the_same_seed_keeps_the_same_and_another_other_ones():
    one, two, other = (offered(Reservoir(), examples(40), (), 8, s)[0] for s in (1, 1, 2))
    assert one == two != other


def test_a_smaller_size_lets_go_of_some_and_a_larger_one_brings_none_back():
    first, _ = offered(Reservoir(), examples(40), (), 8, 0)
    smaller, _ = offered(first, [], (), 3, 1)
    larger, _ = offered(first, examples(40, 1), (), 20, 1)
    assert len(smaller.kept) == 3
    assert set(texts(smaller)) < set(texts(first))
    assert len(larger.kept) == 8  # 20 of which 8 are old would favour the new
    never_full, _ = offered(offered(Reservoir(), examples(4), (), 8, 0)[0], examples(40), (), 20, 1)
    assert len(never_full.kept) == 20


def test_it_comes_back_from_its_bytes_with_labels_by_name_in_a_grown_label_set():
    outputs = torch.tensor([0.5, -1.0])
    kept = Kept(Example("a", "b", 1), (0, 1), outputs)
    before = Reservoir(7, (kept, Kept(Example("c", label=0), (0, 1))), public=False)
    grown = ModelSpec("m", "classification", labels=("new", "cat", "dog", "rank"))

    after = read(written(before, MODEL), grown)

    assert (after.offered, after.public) == (7, False)
    assert [one.example for one in after.kept] == [Example("a", "b", 2), Example("c", label=1)]
    assert [one.labels for one in after.kept] == [(1, 2), (1, 2)]
    assert torch.equal(after.kept[0].outputs, outputs)
    assert after.kept[1].outputs is None


def test_a_language_models_examples_come_back_too():
    model = ModelSpec("m", "causal-lm")
    before = Reservoir(1, (Kept(Example(prompt="a", completion="b")),))
    assert read(written(before, model), model) == before


def test_a_label_that_is_gone_is_refused():
    parts = written(Reservoir(1, (Kept(Example("a", label=2), (1, 2)),)), MODEL)
    fewer = ModelSpec("m", "classification", labels=("cat", "dog"))
    with pytest.raises(NotKept, match="has the label 'rank' in its task, which is outside"):
        read(parts, fewer)


def test_nothing_kept_is_an_empty_reservoir():
    assert read({}, MODEL) == Reservoir()


def test_its_examples_are_the_same_bytes_whatever_their_outputs():
    bare, with_outputs = (
        Reservoir(1, (Kept(Example("a", label=0), (0,), o),)) for o in (None, torch.ones(1))
    )
    name = "examples.json"
    assert written(bare, MODEL)[name] == written(with_outputs, MODEL)[name]


def test_no_text_shows_in_its_representation():
    found, _ = offered(Reservoir(), [Example("secret words", label=0)], (0,), 8, 0)
    assert "secret" not in repr(found)
