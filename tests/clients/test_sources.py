import csv
import gzip
import json
import sys

import pytest

from clients import data, sources
from clients.assignment import DataSpec, ModelSpec
from clients.data import BadDataURI, BadRecord, DataNotFound, Example

MODEL = ModelSpec(id="m", kind="classification", labels=("int", "float", "str"), max_length=8)


def row(i=0, label="int", **more):
    return {"text": f"w{i}", "label": label, **more}


def test_a_uri_has_a_scheme_a_path_and_options():
    uri = "hf:stanfordnlp/imdb?split=train&revision=abc"
    scheme, path, options = data.parse_uri(uri)
    assert (scheme, path) == ("hf", "stanfordnlp/imdb")
    assert options == {"split": "train", "revision": "abc"}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("jsnl:a", "there is no scheme 'jsnl:'; did you mean 'jsonl:'"),
        ("notes.csv", r"has no scheme .*; write csv:notes\.csv"),
        ("notes.jsonl.gz", r"write jsonl:notes\.jsonl\.gz"),
        ("jsonl:", "names no data"),
        ("jsonl:a?split=train", "there is no jsonl option 'split'.*allowed: none"),
        ("hf:a?splt=train", "did you mean 'split'"),
        ("hf:a?split", "options are"),
        ("site:", "names no data"),
        ("site:Notes", "a site calls its data by lower-case letters"),
        ("site:../notes", "a site calls its data by lower-case letters"),
        ("site:notes?split=test", "there is no site option 'split'"),
        ("several:jsonl:a;site:notes", "site:notes cannot be one of several; name it alone"),
        ("builtin:parameter-typs", "did you mean 'parameter-types'"),
        ("builtin:parameter-types?split=dev", "allowed: train, test"),
        ("builtin:parameter-types?client=numpie", "did you mean 'numpy'"),
    ],
)
def test_a_bad_uri_gets_a_sentence(uri, message):
    with pytest.raises(BadDataURI, match=message):
        data.parse_uri(uri)


def test_what_a_site_calls_its_data_is_no_place_and_nothing_that_can_be_read_here():
    uri = "site:ward-7.notes"

    assert data.absolute(uri) == uri
    assert data.is_elsewhere(uri)
    assert not data.is_there(uri)
    assert not data.is_public(uri)
    for read in (data.content_of, sources.source_state, sources.open_source):
        with pytest.raises(data.DataElsewhere, match=r"site:ward-7\.notes lies at a site"):
            read(uri)
    assert not data.is_elsewhere("jsonl:site")


def test_only_builtin_data_are_public():
    assert data.is_public("builtin:parameter-types?split=test")
    assert not data.is_public("jsonl:builtin")
    assert not data.is_public("hf:stanfordnlp/imdb")


ROWS = [row(1), row(2, "str"), row(3, "float")]
EXPECTED = [Example("w1", label=0), Example("w2", label=2), Example("w3", label=1)]


def write_jsonl(path):
    path.write_text("\ufeff" + "".join(json.dumps(r) + "\n\n" for r in ROWS))


def write_jsonl_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))


def write_csv(path):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "text_pair"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_csv_gz(path):
    path.write_bytes(gzip.compress(b"text,label\r\nw1,int\r\nw2,2\r\nw3,float\r\n"))


def write_parquet(path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("scheme", "name", "write"),
    [
        ("jsonl", "a.jsonl", write_jsonl),
        ("jsonl", "a.jsonl.gz", write_jsonl_gz),
        ("csv", "a.csv", write_csv),
        ("csv", "a.csv.gz", write_csv_gz),
        ("parquet", "a.parquet", write_parquet),
    ],
)
def test_every_file_format_gives_the_same_examples(tmp_path, scheme, name, write):
    write(tmp_path / name)
    assert data.examples(DataSpec(f"{scheme}:{tmp_path / name}"), MODEL) == EXPECTED


def test_a_local_hub_folder_is_read_with_its_own_class_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["str", "int"])}
    )
    rows = [{"text": "w1", "label": 0}, {"text": "w2", "label": 1}]
    made = datasets.Dataset.from_list(rows, features=features)
    folder.mkdir()
    made.to_parquet(str(folder / "train.parquet"))
    found = data.examples(DataSpec(f"hf:{folder}"), MODEL)
    # index 0 is "str" in the data set and "int" in the model
    assert found == [Example("w1", label=2), Example("w2", label=0)]
    with pytest.raises(BadDataURI, match="test"):
        data.examples(DataSpec(f"hf:{folder}?split=test"), MODEL)
    with pytest.raises(DataNotFound, match="no data set hf:"):
        data.examples(DataSpec(f"hf:{tmp_path / 'nowhere'}"), MODEL)


def test_tags_of_a_hub_folder_are_read_by_their_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["B-X", "I-X", "O"])),
        }
    )
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": [2, 0, 1]}]
    (tmp_path / "folder").mkdir()
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    model = ModelSpec("m", "token-classification", labels=("O", "B-X", "I-X"))

    [found] = data.examples(DataSpec(f"hf:{tmp_path / 'folder'}", {"tags": "ner_tags"}), model)

    assert (found.text, found.tags) == ("a b c", (0, 1, 2))


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [("parquet", "pyarrow.parquet", "parquet"), ("hf", "datasets", "hub")],
)
def test_a_reader_without_its_package_names_the_extra(jsonl, monkeypatch, scheme, module, extra):
    jsonl(row())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(data.MissingExtra, match=rf"pip install 'weft\[{extra}\]'"):
        data.examples(DataSpec(f"{scheme}:notes.jsonl"), MODEL)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataNotFound, match=r"there is no file .*nowhere\.jsonl"):
        data.examples(DataSpec(f"jsonl:{tmp_path}/nowhere.jsonl"), MODEL)
    with pytest.raises(DataNotFound, match="is a folder"):
        data.examples(DataSpec(f"csv:{tmp_path}"), MODEL)


def test_a_file_that_is_no_parquet_is_named(jsonl):
    pytest.importorskip("pyarrow")
    jsonl(row())
    with pytest.raises(BadRecord, match=r"notes\.jsonl is not a parquet file"):
        data.examples(DataSpec("parquet:notes.jsonl"), MODEL)


def test_builtin_data_have_the_label_set_of_their_module(tmp_path, monkeypatch):
    from clients.builtin import parameter_types

    rows = [{"text": "x: y", "label": "mapping", "client": "torch", "file": "a.py"}]
    monkeypatch.setattr(parameter_types, "_load", lambda: {"train": rows, "test": []})
    model = ModelSpec(id="m", kind="classification", labels=parameter_types.LABELS)
    spec = DataSpec("builtin:parameter-types?split=train&client=torch")
    assert data.examples(spec, model) == [Example("x: y", label=7)]
