"""Entities in tags, counted by hand: the cases are those of seqeval's strict mode for IOB2."""

from __future__ import annotations

import pytest

from clients.entities import entities, entity_scores

CASES = [
    ("O O", []),
    ("B-A", [("A", 0, 1)]),
    ("B-A I-A I-A O", [("A", 0, 3)]),
    ("O B-A B-A", [("A", 1, 2), ("A", 2, 3)]),
    ("B-A I-B", [("A", 0, 1)]),  # what continues another kind is no entity
    ("I-A I-A", []),
    ("O I-A B-A I-A", [("A", 2, 4)]),
    ("B-A O I-A", [("A", 0, 1)]),
    ("B-A B-B I-B", [("A", 0, 1), ("B", 1, 3)]),
]


@pytest.mark.parametrize(("tags", "wanted"), CASES)
def test_an_entity_begins_with_b_and_goes_on_with_i_of_its_kind(tags, wanted):
    assert sorted(entities(tags.split())) == wanted


def test_a_word_that_is_not_scored_ends_an_entity():
    assert sorted(entities(["B-A", "", "I-A", "B-A"])) == [("A", 0, 1), ("A", 3, 4)]


def scores(*pairs):
    truth, predicted = zip(*pairs, strict=True)
    return entity_scores((t.split() for t in truth), (p.split() for p in predicted))


def test_only_a_whole_entity_of_the_right_kind_counts():
    found = scores(
        ("B-A I-A O B-B", "B-A I-A O B-B"),  # two right
        ("B-A I-A O", "B-A O O"),  # too short
        ("B-A O", "B-B O"),  # another kind
        ("O O", "O B-A"),  # there is none
        ("B-A", "O"),  # missed
    )

    assert found == {
        "entity_precision": 2 / 5,
        "entity_recall": 2 / 5,
        "entity_f1": 2 * 2 / (5 + 5),
    }


def test_a_perfect_prediction_has_one_and_none_at_all_has_zero():
    assert set(scores(("B-A I-A B-A", "B-A I-A B-A")).values()) == {1.0}
    assert set(scores(("B-A I-A B-A", "O O O")).values()) == {0.0}


def test_the_same_places_in_two_texts_are_two_entities():
    assert scores(("B-A", "B-A"), ("O", "B-A"))["entity_precision"] == 0.5


def test_where_no_entity_is_to_be_found_there_is_no_score():
    assert scores(("O O", "O B-A")) == {}
