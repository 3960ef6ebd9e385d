"""Words and tags: from tokens, from spans of characters, and what is wrong with either."""

from __future__ import annotations

import gzip
import hashlib
import json
import traceback

import pytest

from clients import data, inspection
from clients.assignment import DataSpec, ModelSpec, Shard
from clients.data import BadRecord, BadSelection, Example
from clients.examples import record_digest
from clients.tags import is_bio, joined, scheme_problem, spans_to_tags, words_of

CANARY = "zyzzyva"  # stands for what a patient said
LABELS = ("O", "B-WHO", "I-WHO", "B-DOSE", "I-DOSE")
MODEL = ModelSpec(id="m", kind="token-classification", labels=LABELS, max_length=8)
GOOD = {"tokens": ["Ada", "takes", "5", "mg"], "tags": ["B-WHO", "O", "B-DOSE", "I-DOSE"]}
TEXT = f"{CANARY} takes 5mg."


def span(start, end, label="WHO"):
    return {"start": start, "end": end, "label": label}


BAD = [
    ({"tokens": [CANARY], "tags": ["O", "O"]}, "has 1 tokens and 2 tags; one each is needed"),
    ({"tokens": [], "tags": []}, "the field 'tokens' is empty"),
    ({"tokens": CANARY, "tags": ["O"]}, "the field 'tokens' must be a list, got str"),
    ({"tokens": [CANARY], "tags": None}, "the field 'tags' must be a list, got null"),
    ({"tokens": [CANARY]}, r"has no field 'tags' \(fields: tokens\); map it with --fields tags="),
    ({"words": [CANARY]}, r"has no field 'tokens' \(fields: words\); map it with --fields"),
    ({"tokens": [CANARY, " "], "tags": [0, 0]}, "token 2 is empty"),
    ({"tokens": [CANARY, 7], "tags": [0, 0]}, "token 2 must be text, got int"),
    ({"tokens": [CANARY + "\ud800"], "tags": [0]}, "token 1 is not UTF-8"),
    ({"tokens": [CANARY], "tags": ["B-X"]}, r"label 'B-X' is outside the label set \(O, B-WHO"),
    ({"tokens": [CANARY], "tags": [5]}, "label 5 is outside the label set"),
    ({"tokens": [CANARY] * 2, "tags": [0, 2]}, r"tag 2 \(I-WHO\) continues no entity of its kind"),
    ({"tokens": [CANARY] * 2, "tags": [1, 4]}, r"tag 2 \(I-DOSE\) continues no entity of its ki"),
    ({"text": TEXT, "spans": "WHO"}, "the field 'spans' must be a list, got str"),
    ({"text": "", "spans": []}, "the field 'text' is empty"),
    ({"text": "\u200b\x07", "spans": []}, "the text has no word"),
    ({"text": TEXT, "spans": [[0, 7]]}, "span 1 must be an object with start, end and label"),
    ({"text": TEXT, "spans": [span(0, 7), span(9, 9)]}, "span 2 must have 0 <= start < end <= 18"),
    ({"text": TEXT, "spans": [span(0, 70)]}, "span 1 must have 0 <= start < end <= 18"),
    ({"text": TEXT, "spans": [span(0, 7.0)]}, "span 1 must have 0 <= start < end <= 18"),
    ({"text": TEXT, "spans": [span(0, 7, CANARY * 9)]}, "span 1: label of 63 characters is outs"),
    ({"text": TEXT, "spans": [span(0, 7, ["WHO"])]}, r"span 1: label \['WHO'\] is outside"),
    ({"text": TEXT, "spans": [span(0, 6)]}, r"span 1 ends inside a word \(characters 0 to 6\)"),
    ({"text": TEXT, "spans": [span(2, 7)]}, r"span 1 begins inside a word \(characters 2 to 7\)"),
    ({"text": TEXT, "spans": [span(7, 8)]}, "span 1 covers no word"),
    ({"text": TEXT, "spans": [span(0, 7), span(0, 13)]}, "spans 1 and 2 overlap; a word has one"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_record_is_refused_with_its_line_and_without_its_words(jsonl, bad, message):
    uri = jsonl(GOOD, bad)
    with pytest.raises(BadRecord, match=rf"^notes\.jsonl, line 2: {message}") as caught:
        data.examples(DataSpec(uri), MODEL)
    said = "".join(traceback.format_exception(caught.value))
    assert CANARY not in said.replace(CANARY * 9, "")
    assert caught.value.__context__ is None, "the cause of a bad record carries the record"


def test_a_table_without_lists_says_so(tmp_path):
    (tmp_path / "a.csv").write_text("tokens,tags\nAda takes,B-WHO O\n")
    spec = DataSpec(f"csv:{tmp_path / 'a.csv'}")
    with pytest.raises(BadRecord, match="must be a list, got str; CSV has no lists, use jsonl"):
        data.examples(spec, MODEL)


def test_tokens_and_tags_are_one_text_with_places():
    assert joined(["Ada", "5 mg", "."]) == ("Ada 5 mg .", ((0, 3), (4, 8), (9, 10)))


def test_spans_and_tokens_of_the_same_words_give_the_same_tags(jsonl):
    uri = jsonl(  # spans in any order; 5 and mg are two words
        {"text": "Ada Byron, 5mg", "spans": [span(11, 14, "DOSE"), span(0, 9)]},
        {
            "tokens": ["Ada", "Byron", ",", "5", "mg"],
            "tags": ["B-WHO", "I-WHO", "O", "B-DOSE", "I-DOSE"],
        },
    )
    one, other = data.examples(DataSpec(uri), MODEL)

    assert one.tags == other.tags == (1, 2, 0, 3, 4)
    assert [one.text[a:b] for a, b in one.words] == [other.text[a:b] for a, b in other.words]


def test_a_span_may_have_blanks_at_its_ends_and_another_right_beside_it():
    words, tags = spans_to_tags("a  b c", [span(0, 3), span(3, 4), span(4, 6, "DOSE")], LABELS)

    assert words == ((0, 1), (3, 4), (5, 6))
    assert tags == ("B-WHO", "B-WHO", "B-DOSE")


def test_tags_that_mark_no_entities_stand_for_themselves_in_spans_too():
    assert spans_to_tags("a b c", [span(0, 3)], ("O", "WHO"))[1] == ("WHO", "WHO", "O")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("naïve café-au-lait", ["naïve", "café", "-", "au", "-", "lait"]),
        ("e\u0301te\u0301 12.5%", ["e\u0301te\u0301", "12", ".", "5", "%"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("a\u200cb \u200b c", ["a\u200cb", "c"]),
        ("東京 Tower", ["東", "京", "Tower"]),
        ("a_b\t\nc\u00a0d", ["a", "_", "b", "c", "d"]),
    ],
)
def test_words_are_letters_with_their_marks_digits_or_single_signs(text, words):
    assert [text[a:b] for a, b in words_of(text)] == words


@pytest.mark.parametrize(
    ("labels", "task", "problem"),
    [
        (LABELS, (), None),
        (("NOUN", "VERB"), ("NOUN",), None),
        (LABELS, ("O", "B-WHO", "I-WHO"), None),
        (LABELS, ("B-WHO", "I-WHO"), "task_labels: without 'O' entities cannot be told"),
        (LABELS, ("O", "B-WHO"), "task_labels: without 'I-WHO' entities"),
        (("O", "I-WHO"), (), "labels: 'I-WHO' marks entities, whose tags are 'O', 'B-NAME'"),
        (("B-WHO", "I-WHO"), (), "labels: 'B-WHO' marks entities"),
        (("O", "B-A", "I-A", "E-A"), (), "labels: 'B-A' marks entities"),
    ],
)
def test_a_set_of_tags_is_a_whole_scheme_or_none(labels, task, problem):
    found = scheme_problem(labels, task)
    assert (found is None) if problem is None else found.startswith(problem)


def test_a_set_of_entity_tags_may_have_kinds_of_one_word():
    assert is_bio(("O", "B-YEAR"))
    assert not is_bio(())


def test_an_example_says_what_its_tags_are_in_its_digest_and_not_in_its_representation(jsonl):
    uri = jsonl(GOOD, {**GOOD, "tags": ["O", "O", "B-DOSE", "I-DOSE"]})
    one, other = data.examples(DataSpec(uri), MODEL)

    assert record_digest(one, None) != record_digest(other, None)
    assert "Ada" not in repr(one)


def test_a_record_without_words_has_the_digest_that_it_always_had():
    message = b'weft:record:1:["w1", null, 0, null, null]'
    assert record_digest(Example("w1", label=0), None) == hashlib.sha256(message).digest()


def test_other_words_are_around_a_task_s_own_and_texts_without_these_are_left_out(jsonl):
    only_who = {"tokens": ["Ada", "?"], "tags": ["B-WHO", "O"]}
    only_dose = {"tokens": ["5"], "tags": ["B-DOSE"]}
    spec = DataSpec(jsonl(GOOD, only_who, only_dose), labels=("O", "B-WHO", "I-WHO"))

    found = data.examples(spec, MODEL)

    assert [example.tags for example in found] == [(1, 0, -100, -100), (1, 0)]


def test_texts_with_tags_can_be_parted_at_random_and_by_column_but_not_by_label(jsonl):
    uri = jsonl(*({**GOOD, "ward": f"w{i % 2}"} for i in range(6)))
    halves = data.partition_specs(DataSpec(uri), "iid", parts=2, model=MODEL)
    wards = data.partition_specs(DataSpec(uri), "column", column="ward", model=MODEL)

    assert [len(data.examples(spec, MODEL)) for _, spec in [*halves, *wards]] == [3, 3, 3, 3]
    assert wards[0][1].shard == Shard("column", column="ward", value="w0")
    with pytest.raises(BadSelection, match="token-classification has one for each word; use iid"):
        data.partition_specs(DataSpec(uri), "dirichlet", parts=2, model=MODEL)


def test_a_check_counts_words_by_their_tags_and_reads_names_of_one_s_own(tmp_path):
    rows = [{"w": GOOD["tokens"], "ner": GOOD["tags"]}] * 2 + [{"w": [], "ner": []}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    spec = DataSpec(f"jsonl:{path}", {"tokens": "w", "tags": "ner"})

    report = inspection.inspect(spec, LABELS, None, 8, "token-classification")

    assert (report.total, report.num_bad, report.num_duplicates) == (3, 1, 1)
    assert report.labels == {"O": 2, "B-WHO": 2, "I-WHO": 0, "B-DOSE": 2, "I-DOSE": 2}
    assert inspection.check(spec).num_bad == 1  # without a task any record with words is good


@pytest.mark.parametrize(
    ("labels", "message"), [((), "needs the declared tags; give --labels O"), (("O", "I-A"), "BIO")]
)
def test_a_check_wants_the_whole_set_of_tags(labels, message):
    with pytest.raises(inspection.BadLabels, match=message):
        inspection.inspect(DataSpec("jsonl:none"), labels, None, 8, "token-classification")
