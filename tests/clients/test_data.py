import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clients import data, inspection
from clients.assignment import DataSpec, ModelSpec, Shard
from clients.data import BadRecord, BadSelection, Example
from clients.examples import digest

CANARY = "zyzzyva-7731"  # stands for what a patient said
MODEL = ModelSpec(id="m", kind="classification", labels=("int", "float", "str"), max_length=8)
CAUSAL = ModelSpec(id="m", kind="causal-lm", max_length=12)


@pytest.fixture
def tokenizer():
    """One token a word, and no special token."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def row(i=0, label="int", **more):
    return {"text": f"w{i}", "label": label, **more}


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_parts_of_a_data_set_hold_every_example_once(jsonl, partition):
    uri = jsonl(*(row(i, i % 3) for i in range(40)))
    whole = data.examples(DataSpec(uri), MODEL)
    specs = data.partition_specs(DataSpec(uri), partition, parts=5, seed=7, model=MODEL)
    assert [name for name, _ in specs] == [f"part-{i}" for i in range(5)]
    parts = [data.examples(spec, MODEL) for _, spec in specs]
    assert all(parts)
    assert sorted(e.text for part in parts for e in part) == sorted(e.text for e in whole)
    assert parts == [data.examples(spec, MODEL) for _, spec in pickle.loads(pickle.dumps(specs))]


def test_a_column_gives_one_client_for_each_value(jsonl):
    uri = jsonl(row(1, site="b"), row(2, site="a"), row(3, site=7), row(4, "str", site="b"))
    specs = data.partition_specs(DataSpec(uri), "column", column="site", model=MODEL)
    texts = {name: [e.text for e in data.examples(spec, MODEL)] for name, spec in specs}
    assert list(texts.items()) == [("7", ["w3"]), ("a", ["w2"]), ("b", ["w1", "w4"])]


def test_a_data_set_that_is_split_is_read_once_for_all_of_its_parts(jsonl):
    uri = jsonl(*(row(i, i % 3) for i in range(6)))
    specs = [spec for _, spec in data.partition_specs(DataSpec(uri), "iid", parts=3, model=MODEL)]
    first = [data.examples(spec, MODEL) for spec in specs]
    again = [data.examples(spec, MODEL) for spec in specs]
    assert [[id(e) for e in part] for part in first] == [[id(e) for e in part] for part in again]


def test_the_parts_follow_a_file_that_changes(jsonl):
    uri = jsonl(row(1), row(2))
    file = Path(uri.removeprefix("jsonl:"))
    [(_, spec)] = data.partition_specs(DataSpec(uri), "iid", parts=1, model=MODEL)
    before = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("w1", "w9"))  # as long as it was
    os.utime(file, ns=(before, before + 1))
    assert [e.text for e in data.examples(spec, MODEL)] == ["w9", "w2"]


def test_the_same_file_read_another_way_is_split_anew(jsonl):
    uri = jsonl(row(1, note="n1"), row(2, note="n2"))
    [(_, spec)] = data.partition_specs(DataSpec(uri), "iid", parts=1, model=MODEL)
    other = replace(spec, fields={"text": "note"})
    assert [e.text for e in data.examples(other, MODEL)] == ["n1", "n2"]
    assert [e.text for e in data.examples(spec, MODEL)] == ["w1", "w2"]


def test_a_data_set_that_is_not_split_does_not_stay_in_memory(jsonl):
    spec = DataSpec(jsonl(row(1)))
    [first] = data.examples(spec, MODEL)
    [again] = data.examples(spec, MODEL)
    assert first == again
    assert first is not again


def test_a_part_keeps_to_the_selected_labels(jsonl):
    uri = jsonl(*(row(i, i % 3) for i in range(30)))
    selected = DataSpec(uri, labels=("float",))
    specs = data.partition_specs(selected, "iid", parts=2, model=MODEL)
    parts = [data.examples(spec, MODEL) for _, spec in specs]
    assert [len(part) for part in parts] == [5, 5]
    assert {example.label for part in parts for example in part} == {1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"partition": "iid", "parts": 4}, BadSelection, "has 3 examples .* each of 4 parts"),
        ({"partition": "iid", "parts": 0}, BadSelection, "got part 0 of 0"),
        ({"partition": "dirichlet", "alpha": 0.0}, BadSelection, "alpha must be > 0, got 0"),
        ({"partition": "column"}, BadSelection, "needs the name of a column"),
        ({"partition": "column", "column": "site"}, BadRecord, "has no field 'site' to split by"),
        ({"partition": "column", "column": "list"}, BadRecord, "text or an integer, got list"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(jsonl, arguments, error, message):
    uri = jsonl(*(row(i, list=[]) for i in range(3)))
    with pytest.raises(error, match=message):
        data.partition_specs(DataSpec(uri), **arguments, model=MODEL)


def test_a_part_that_is_not_there_is_refused(jsonl):
    spec = DataSpec(jsonl(row()), shard=Shard("iid", index=2, total=2))
    with pytest.raises(BadSelection, match="got part 2 of 2"):
        data.examples(spec, MODEL)
    with pytest.raises(BadSelection, match="is a part already"):
        data.partition_specs(spec, "iid", model=MODEL)


def test_a_dirichlet_split_needs_labels(jsonl):
    with pytest.raises(BadSelection, match="causal-lm has none"):
        data.partition_specs(DataSpec(jsonl(row())), "dirichlet", model=CAUSAL)


PRIVATE = DataSpec("jsonl:a")
EXAMPLES = [Example("w1", label=0), Example("w2", "w3", 1), Example("w1", label=0)]


@settings(max_examples=25, deadline=None)
@given(st.permutations(EXAMPLES), st.sampled_from([b"key", None]))
def test_a_fingerprint_does_not_follow_the_order(examples, key):
    assert data.fingerprint(PRIVATE, examples, key) == data.fingerprint(PRIVATE, EXAMPLES, key)


def test_a_fingerprint_changes_with_every_part_of_a_record():
    variants = [
        [],
        [Example("w1")],
        [Example("w1"), Example("w1")],
        [Example("w1", label=0)],
        [Example("w1", "")],
        [Example(prompt="w1")],
        [Example(completion="w1")],
    ]
    assert len({data.fingerprint(PRIVATE, examples, b"key") for examples in variants}) == 7


def test_a_fingerprint_of_private_data_cannot_be_made_without_the_key():
    keyed = data.fingerprint(PRIVATE, EXAMPLES, b"key")
    assert keyed != data.fingerprint(PRIVATE, EXAMPLES, b"other")
    assert keyed != data.fingerprint(PRIVATE, EXAMPLES, None)


def test_a_fingerprint_of_public_data_is_the_same_everywhere():
    public = DataSpec("builtin:parameter-types")
    assert data.fingerprint(public, EXAMPLES, b"key") == digest(EXAMPLES, None)


def test_a_check_counts_what_a_run_would_refuse(jsonl, tokenizer):
    bad = [row(label=CANARY * 9)] * 25
    uri = jsonl(row(1), row(1), row(2, "str"), row(3, text="w1 " * 10), *bad)
    report = inspection.check(DataSpec(uri, labels=("int",)), MODEL, tokenizer)
    assert (report.total, report.num_bad, len(report.problems)) == (29, 25, 20)
    assert report.problems[0].startswith("notes.jsonl, line 5: label of 108 characters")
    assert report.labels == {"int": 3, "float": 0, "str": 1}
    assert report.num_duplicates == 1
    assert report.lengths == inspection.Lengths(1, 1.0, 10, 10, num_truncated=1)
    assert CANARY not in repr(report)


def test_a_check_without_a_model_counts_labels_as_they_are_written(jsonl):
    uri = jsonl(row(1, "b"), row(2, "a"), row(3, "b"), {"text": "w4"}, {"prompt": "w5"}, "{")
    report = inspection.check(DataSpec(uri))
    assert (report.total, report.num_bad) == (6, 2)
    assert report.labels == {"a": 1, "b": 2}
    assert report.lengths is None


def test_a_check_of_an_empty_file_reports_nothing(jsonl, tokenizer):
    report = inspection.check(DataSpec(jsonl()), MODEL, tokenizer)
    assert (report.total, report.num_bad, report.lengths) == (0, 0, None)


def test_a_check_finds_the_shared_data_sets_good():
    file = Path(__file__).resolve().parents[2].parent / "shared/data/boolq.test.jsonl.gz"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    model = ModelSpec(id="m", kind="classification", labels=("no", "yes"))
    report = inspection.check(DataSpec(f"jsonl:{file}"), model)
    assert (report.total, report.num_bad) == (800, 0)
    assert report.labels == {"no": 400, "yes": 400}
