import sys
from collections import Counter

import pytest

from clients.assignment import ModelSpec
from clients.builtin import code_mentions
from clients.builtin.code_mentions import LABELS, mentions, parse_package, split_rows, unmarked
from clients.tags import spans_to_tags

NUMPYDOC = """Do something.

Parameters
----------
x, y : ndarray
    What is added to `y` along :py:class:`~numpy.ndarray`.
axis : int
    The axis; ``None`` is all of them, as in `reduce <https://a.b>`_ and ``x[0]``.
out : ndarray
    Where the many results of it are put.
"""
GOOGLEDOC = """Do something.

Args:
    names (`list[str]`): Which of the `names` are kept, by `"all"` or `re.match`.
    many (`bool`): Whether the `names`s are many, and some more words.
"""


def said(text, spans):
    return [(text[span["start"] : span["end"]], span["label"]) for span in spans]


def test_marks_are_cut_from_a_numpy_docstring_and_become_mentions():
    found = {text: said(text, spans) for text, spans in mentions(NUMPYDOC)}

    assert found == {
        "What is added to y along numpy.ndarray.": [("y", "PARAM"), ("numpy.ndarray", "CODE")],
        "The axis; None is all of them, as in reduce and x[0].": [
            *(("None", "VALUE"), ("reduce", "CODE"), ("x[0]", "CODE"))
        ],
    }


def test_a_mark_in_the_middle_of_a_word_leaves_its_description_out():
    [(text, spans)] = mentions(GOOGLEDOC)

    assert said(text, spans) == [("names", "PARAM"), ('"all"', "VALUE"), ("re.match", "CODE")]


def test_a_long_description_ends_with_a_sentence_and_loses_the_mentions_behind_it():
    text, spans = unmarked("The `x` of it. " * 30, {"x"})

    assert len(text) <= 300
    assert text.endswith("of it.")
    assert said(text, spans) == [("x", "PARAM")] * text.count("x")


@pytest.mark.parametrize("client", ["peft"])
def test_an_installed_package_gives_rows_that_a_run_can_read_without_importing_it(client):
    rows = parse_package(client)
    model = ModelSpec("m", "token-classification", labels=LABELS)
    counts = Counter(
        tag for row in rows for tag in spans_to_tags(row["text"], row["spans"], model.labels)[1]
    )

    assert len(rows) > 100
    assert set(counts) == set(LABELS)
    assert counts["O"] > sum(counts.values()) / 2
    assert not [row for row in rows if "`" in row["text"]]


def test_a_package_that_is_not_installed_has_no_rows():
    assert parse_package("no_such_package_anywhere") == []
    assert "no_such_package_anywhere" not in sys.modules


def test_train_and_test_share_no_file_and_no_description():
    rows = [
        {"text": text, "spans": [], "client": "numpy", "file": file}
        for file in "abcdefghijklmnop"
        for text in ("what all say", f"what {file} says")
    ]
    split = split_rows(rows)

    assert split["test"]
    for part in ("text", "file"):
        assert {r[part] for r in split["train"]}.isdisjoint(r[part] for r in split["test"])


@pytest.mark.parametrize(("split", "client"), [("dev", None), ("train", "tensorflow")])
def test_an_unknown_split_or_client_is_refused(split, client):
    with pytest.raises(ValueError, match="must be one of"):
        code_mentions.rows(split, client)
