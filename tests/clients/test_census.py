"""Populations that share a record are found, whatever it is called, and nothing else is told."""

import json
import os
import stat

import pytest

from clients.assignment import DataSpec, ModelSpec, Shard
from clients.census import Census, Holding, content_digest
from clients.examples import Example

KEY = bytes(32)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes texts as a data set and returns its spec."""

    def make(name, *texts, column="text"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({column: text, "label": "x"}) + "\n" for text in texts))
        return DataSpec(f"jsonl:{path}", {} if column == "text" else {"text": column})

    return make


@pytest.fixture
def census(tmp_path):
    """Return the census of a site."""
    return Census(tmp_path / "site")


def taken(census, **specs):
    for population, spec in specs.items():
        census.take([Holding(population, spec)])
    return census.related()


def test_data_sets_without_a_common_record_are_strangers(census, write):
    assert taken(census, a=write("a", "one", "two"), b=write("b", "three")) == {}


def test_the_same_file_under_another_name_is_related(census, write):
    spec = write("a", "one", "two")

    assert taken(census, a=spec, b=spec) == {"a": {"b"}, "b": {"a"}}


def test_one_row_more_or_a_subset_of_one_row_is_related(census, write):
    many = [f"note {i}" for i in range(200)]
    found = taken(
        census,
        whole=write("whole", *many),
        longer=write("longer", *many, "one more"),
        subset=write("subset", many[137]),
    )

    assert found["whole"] == {"longer", "subset"}
    assert found["subset"] == {"whole", "longer"}


TOKENS = {"tokens": ["folic", "acid"], "tags": ["O", "O"]}
ANSWER = {"prompt": "folic", "completion": "acid"}


@pytest.mark.parametrize(
    ("form", "beside"),
    [(TOKENS, {"text": "note 17"}), (TOKENS, ANSWER), ({"text": "folic acid"}, ANSWER)],
    ids=["tokens beside a text", "tokens beside an answer", "a text beside an answer"],
)
def test_a_record_is_recognised_by_whatever_of_it_a_run_may_train_on(
    census, tmp_path, form, beside
):
    specs = {}
    for name, row in (("bare", form), ("dressed", {**beside, **form})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        specs[name] = DataSpec(f"jsonl:{tmp_path / name}.jsonl")

    assert taken(census, **specs)["bare"] == {"dressed"}


def test_who_shares_with_a_third_is_not_related_through_it(census, write):
    found = taken(
        census, a=write("a", "one", "two"), b=write("b", "two", "three"), c=write("c", "three")
    )

    assert found == {"a": {"b"}, "b": {"a", "c"}, "c": {"b"}}


def test_a_row_that_was_deleted_still_relates(census, write):
    taken(census, a=write("a", "one", "two"))
    taken(census, a=write("a", "two and more"))

    assert taken(census, b=write("b", "one")) == {"a": {"b"}, "b": {"a"}}


def test_a_row_that_is_added_later_relates_from_then_on(census, write):
    first = write("a", "one")
    assert taken(census, a=first, b=write("b", "two")) == {}

    assert taken(census, a=write("a", "one", "two")) == {"a": {"b"}, "b": {"a"}}


def test_case_spacing_column_and_label_make_no_other_record(census, write, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text('note,label\n"  The PATIENT  coughs ",y\n')
    spec = DataSpec(f"csv:{other}", {"text": "note"})

    assert taken(census, a=write("a", "the patient coughs"), b=spec)["b"] == {"a"}


def test_data_that_did_not_change_are_not_read_again(census, write, monkeypatch):
    spec = write("a", "one")
    taken(census, a=spec)

    def unread(*_):
        raise AssertionError("it was read")

    monkeypatch.setattr("clients.census.forms", unread)
    taken(census, a=spec)
    with pytest.raises(AssertionError, match="it was read"):
        taken(census, a=write("a", "one", "two"))


def test_a_census_that_breaks_off_adds_nothing(census, write):
    with pytest.raises(FileNotFoundError):
        census.take(
            [Holding("a", write("a", "one")), Holding("b", DataSpec("jsonl:/nowhere.jsonl"))]
        )

    assert taken(census, c=write("c", "one")) == {}


def test_bad_lines_are_left_out(census, write, tmp_path):
    spec = write("a", "one")
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" + path.read_text())

    assert taken(census, a=spec, b=write("b", "one")) == {"a": {"b"}, "b": {"a"}}


def test_more_records_than_are_taken_at_once_are_all_found(census, write, monkeypatch):
    monkeypatch.setattr("clients.census._AT_ONCE", 7)
    many = [f"note {i}" for i in range(50)]

    found = taken(census, a=write("a", *many), first=write("f", many[0]), last=write("l", many[49]))

    assert found["a"] == {"first", "last"}


def test_a_part_of_a_data_set_is_taken_by_itself(census, write):
    model = ModelSpec("m", "classification", labels=("x", "y"))
    spec = write("all", *[f"note {i}" for i in range(8)])
    halves = [
        Holding(f"part-{i}", DataSpec(spec.uri, shard=Shard("iid", i, 2)), model) for i in (0, 1)
    ]
    census.take(halves)
    assert census.related() == {}

    census.take([Holding("whole", spec)])
    assert census.related({"whole"}) == {"whole": {"part-0", "part-1"}}


def test_another_site_makes_other_digests():
    one = Example("the patient coughs", label=0)

    assert content_digest(one, KEY) == content_digest(Example("the patient coughs"), KEY)
    assert content_digest(one, KEY) != content_digest(one, bytes([1]) * 32)
    assert content_digest(one, KEY) != content_digest(Example("the", "patient coughs"), KEY)


def test_no_text_is_in_the_site_s_folder_and_nobody_else_may_read_it(census, write, tmp_path):
    taken(census, a=write("a", "canary-5be1 coughs"))

    site = tmp_path / "site"
    assert all(b"canary-5be1" not in path.read_bytes() for path in site.iterdir())
    assert stat.S_IMODE(os.stat(site).st_mode) == 0o700  # noqa: PTH116  (of a folder, read once)


def test_other_records_of_the_same_person_are_related_where_the_unit_is_a_column(census, tmp_path):
    specs = {}
    for name, text in (("north", "coughs"), ("south", "sleeps well")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"text": text, "patient": 17}) + "\n")
        specs[name] = DataSpec(f"jsonl:{path}", unit="patient")
    plain = {name: DataSpec(spec.uri) for name, spec in specs.items()}
    assert taken(census, **plain) == {}

    assert taken(census, **specs) == {"north": {"south"}, "south": {"north"}}
