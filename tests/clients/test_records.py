import gzip
import json
import traceback

import pytest

from clients import data, inspection
from clients.assignment import DataSpec, ModelSpec
from clients.data import BadRecord, BadSelection, Example

CANARY = "zyzzyva-7731"  # stands for what a patient said
MODEL = ModelSpec(id="m", kind="classification", labels=("int", "float", "str"), max_length=8)
CAUSAL = ModelSpec(id="m", kind="causal-lm", max_length=12)


def row(i=0, label="int", **more):
    return {"text": f"w{i}", "label": label, **more}


BAD_RECORDS = [
    (f'{{"text": "{CANARY}", ', "not JSON"),
    ("[1, 2]", "not a JSON object but a list"),
    ('{"text": ' + "9" * 5000 + "}", "not JSON"),
    (
        {"note": CANARY, "dx": "int"},
        r"has no field 'text' \(fields: note, dx\); map it with --fields",
    ),
    ({"text": CANARY}, r"has no field 'label'"),
    ({"text": "", "label": "int"}, "the field 'text' is empty"),
    ({"text": " \n", "label": "int"}, "the field 'text' is empty"),
    ({"text": None, "label": "int"}, "the field 'text' is empty"),
    ({"text": [CANARY], "label": "int"}, "the field 'text' must be text, got list"),
    ({"text": CANARY + "\ud800", "label": "int"}, "the field 'text' is not UTF-8"),
    ({"text": CANARY, "text_pair": "", "label": 1}, "the field 'text_pair' is empty"),
    (row(label="foo"), r"label 'foo' is outside the label set \(int, float, str\)"),
    (row(label=3), "label 3 is outside the label set"),
    (row(label=-1), "label -1 is outside the label set"),
    (row(label="1"), "label '1' is outside the label set"),
    (row(label=True), "the label must be a name or an index, got bool"),
    (row(label=1.0), "the label must be a name or an index, got float"),
    (row(label=None), "the label must be a name or an index, got null"),
    (row(label=CANARY * 10), "label of 120 characters is outside the label set"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS)
def test_a_bad_record_is_refused_with_its_line_and_without_its_text(jsonl, bad, message):
    uri = jsonl(row(), "", bad)
    with pytest.raises(BadRecord, match=rf"^notes\.jsonl, line 3: {message}") as caught:
        data.examples(DataSpec(uri), MODEL)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None, "the cause of a bad record carries the record"


def test_bytes_that_are_not_utf8_are_a_bad_record(tmp_path):
    for name, scheme in (("a.jsonl", "jsonl"), ("a.csv", "csv")):
        (tmp_path / name).write_bytes(b"text,label\n\xff\xfe,int\n")
        spec = DataSpec(f"{scheme}:{tmp_path / name}")
        problems = inspection.check(spec, MODEL).problems
        assert "not UTF-8" in problems[-1]
        assert "line 2" in problems[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nw1,int\nw2\n", "line 3: has 1 cells where the header has 2"),
        ('text,label\n"w1\nw1",int\n,int\n', "line 4: the field 'text' is empty"),
        ('text,label\nw1,int\n"w2"x,int\nw3,foo\n', "line 3: not CSV"),
        ("text,text\nw1,int\n", "line 1: the header names a column twice"),
        ("text,label\nw1,7\n", "line 2: label '7' is outside"),
    ],
)
def test_a_bad_csv_record_is_refused_with_its_first_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadRecord, match=message):
        data.examples(DataSpec(f"csv:{tmp_path / 'a.csv'}"), MODEL)


def test_a_gzip_that_breaks_off_is_a_bad_record(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(row(i)).encode() + b"\n" for i in range(999)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    spec = DataSpec(f"jsonl:{tmp_path / 'a.jsonl.gz'}")
    with pytest.raises(BadRecord, match="the gzip file is damaged from here on"):
        data.examples(spec, MODEL)
    report = inspection.check(spec, MODEL)
    assert report.num_bad == 1
    assert report.total > 1


def test_columns_are_read_by_the_names_that_the_spec_gives(jsonl):
    uri = jsonl({"note": "w1", "dx": "str", "second": "w2"})
    fields = {"text": "note", "label": "dx", "text_pair": "second"}
    assert data.examples(DataSpec(uri, fields), MODEL) == [Example("w1", "w2", 2)]


def test_a_mapped_column_must_be_there(jsonl):
    uri = jsonl(row())
    with pytest.raises(BadRecord, match=r"has no field 'hypothesis' \(fields: text, label\)$"):
        data.examples(DataSpec(uri, {"text_pair": "hypothesis"}), MODEL)


def test_a_mapping_of_an_unknown_column_is_refused(jsonl):
    with pytest.raises(BadSelection, match="no column is called 'txt'"):
        data.examples(DataSpec(jsonl(row()), {"txt": "note"}), MODEL)


def test_examples_are_selected_by_label_and_all_are_validated(jsonl):
    uri = jsonl(row(1), row(2, "str"), row(3, 1), row(4))
    found = data.examples(DataSpec(uri, labels=("int", "float")), MODEL)
    assert [example.text for example in found] == ["w1", "w3", "w4"]
    with pytest.raises(BadRecord):
        data.examples(DataSpec(jsonl(row(1), row(2, "foo")), labels=("int",)), MODEL)


def test_selecting_a_label_outside_the_label_set_is_refused(jsonl):
    with pytest.raises(BadSelection, match="the label 'bool' is selected"):
        data.examples(DataSpec(jsonl(row()), labels=("bool",)), MODEL)


def test_causal_examples_are_prompts_with_completions_or_plain_text(jsonl):
    uri = jsonl({"prompt": "w1", "completion": "w2"}, {"text": "w3", "label": "any"})
    found = data.examples(DataSpec(uri), CAUSAL)
    assert found == [Example(prompt="w1", completion="w2"), Example("w3")]


@pytest.mark.parametrize("half", [{"prompt": CANARY}, {"completion": CANARY}])
def test_a_prompt_needs_a_completion(jsonl, half):
    with pytest.raises(BadRecord, match="line 1: has no field") as caught:
        data.examples(DataSpec(jsonl(half)), CAUSAL)
    assert CANARY not in str(caught.value)
