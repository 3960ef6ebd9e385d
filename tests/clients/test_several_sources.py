"""Several data sets read as one."""

import json

import pytest

from clients import data
from clients.assignment import DataSpec, ModelSpec
from clients.sources import BadDataURI, DataNotFound, content_of, is_there, source_state

MODEL = ModelSpec("some-model", "classification", labels=("a", "b"))


@pytest.fixture
def files(tmp_path):
    jsonl, table = tmp_path / "one.jsonl", tmp_path / "two.csv"
    jsonl.write_text(json.dumps({"text": "first", "label": "a"}))
    table.write_text("text,label\nsecond,b\nthird,1\n")
    return [f"jsonl:{jsonl}", f"csv:{table}"]


def texts(uri):
    return [example.text for example in data.examples(DataSpec(uri), MODEL)]


def test_several_data_sets_are_read_one_after_the_other(files):
    assert texts(data.several(files)) == ["first", "second", "third"]
    assert data.several(files[:1]) == files[0]


def test_a_bad_record_is_told_with_the_files_it_may_be_in(files, tmp_path):
    (tmp_path / "two.csv").write_text("text,label\nsecond,c\n")
    with pytest.raises(data.BadRecord, match=r"two\.csv"):
        texts(data.several(files))


def test_what_is_true_of_several_is_true_of_each(files, tmp_path, monkeypatch):
    both = data.several(files)
    assert is_there(both)
    assert source_state(both) == (*source_state(files[0]), *source_state(files[1]))
    assert content_of(both) == ";".join(content_of(one) for one in files)
    assert not data.is_public(data.several([files[0], "builtin:parameter-types?split=test"]))
    (tmp_path / "two.csv").unlink()
    assert not is_there(both)
    with pytest.raises(DataNotFound, match=r"two\.csv"):
        texts(both)


def test_each_path_of_several_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = data.several(["jsonl:one.jsonl", "builtin:parameter-types?split=test"])
    wanted = f"several:jsonl:{tmp_path}/one.jsonl;builtin:parameter-types?split=test"
    assert data.absolute(given) == wanted


def test_the_content_of_a_file_is_its_bytes_wherever_it_lies(files, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "one.jsonl").read_bytes())
    assert content_of(f"jsonl:{moved}") == content_of(files[0])
    moved.write_text("other")
    assert content_of(f"jsonl:{moved}") != content_of(files[0])
    assert content_of("builtin:parameter-types") == "builtin:parameter-types"


@pytest.mark.parametrize("uri", ["several:", "several:jsonl:/a;nosuch:/b", "several:jsonl:/a;"])
def test_several_of_which_one_is_no_data_set_are_refused(uri):
    with pytest.raises(BadDataURI):
        data.parse_uri(uri)


def test_a_semicolon_in_a_name_is_refused_among_several():
    with pytest.raises(BadDataURI, match="has a ';'"):
        data.several(["jsonl:/a;b.jsonl", "jsonl:/c.jsonl"])
