import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from clients import data
from clients.assignment import DataSpec, ModelSpec
from clients.data import BadSelection
from clients.holdout import BadHoldout, Holdout, held_out, identity
from clients.site import Site
from clients.worker import perform

MODEL = ModelSpec(id="m", kind="classification", labels=("calm", "ill"), max_length=8)
KEY = b"k" * 32


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(f"jsonl:{path}")


def row(i, **more):
    return {"text": f"note {i}", "label": i % 2, "patient": f"p{i % 40}", **more}


def halves(spec, text="0.2", key=KEY, model=MODEL):
    train, held = Holdout.of(text).parts(spec)
    return [[e.text for e in data.examples(one, model, key)] for one in (train, held)]


def test_what_is_trained_on_and_what_is_held_out_are_all_records_and_none_twice(tmp_path):
    spec = write(tmp_path / "a.jsonl", [row(i) for i in range(400)])
    train, held = halves(spec)
    assert sorted(train + held) == sorted(e.text for e in data.examples(spec, MODEL))
    assert 50 < len(held) < 110  # about a fifth of 400


def test_a_split_stays_as_it_is_when_records_are_reordered_added_and_labelled_anew(tmp_path):
    rows = [row(i) for i in range(200)]
    train, held = map(set, halves(write(tmp_path / "a.jsonl", rows)))
    more = [{**one, "label": 1 - one["label"]} for one in rows] + [row(i) for i in range(200, 300)]
    random.Random(0).shuffle(more)
    train_later, held_later = map(set, halves(write(tmp_path / "b.jsonl", more)))
    assert train <= train_later
    assert held <= held_later


def test_a_split_is_the_same_for_another_task_on_the_same_texts(tmp_path):
    spec = write(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    causal = ModelSpec(id="m", kind="causal-lm", max_length=12)
    assert halves(spec) == halves(spec, model=causal)


def test_a_record_that_is_there_twice_is_on_one_side(tmp_path):
    rows = [row(i) for i in range(60)] + [row(i, text=f"NOTE  {i}") for i in range(60)]
    train, held = halves(write(tmp_path / "a.jsonl", rows))
    plain = [{" ".join(text.lower().split()) for text in side} for side in (train, held)]
    assert not plain[0] & plain[1]


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    known = [identity([f"note {i}"]) for i in range(500)]
    small = {one for one in known if held_out(one, 0.1, KEY)}
    large = {one for one in known if held_out(one, 0.3, KEY)}
    assert small < large


def test_only_the_key_tells_on_which_side_a_record_is(tmp_path):
    spec = write(tmp_path / "a.jsonl", [row(i) for i in range(200)])
    assert halves(spec, key=KEY) != halves(spec, key=b"o" * 32)
    assert halves(spec, key=None) not in (halves(spec, key=KEY), halves(spec, key=b"o" * 32))


def test_people_are_held_out_whole(tmp_path):
    rows = [row(i) for i in range(400)]
    train, held = halves(write(tmp_path / "a.jsonl", rows), "0.3:patient")
    whose = {one["text"]: one["patient"] for one in rows}
    assert held
    assert not {whose[text] for text in train} & {whose[text] for text in held}


def test_simulated_clients_split_their_own_part(tmp_path):
    spec = write(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    parts = [one for _, one in data.partition_specs(spec, "iid", parts=4, model=MODEL)]
    split = [halves(part) for part in parts]
    assert [
        sorted(t + h) == sorted(e.text for e in data.examples(p, MODEL))
        for (t, h), p in zip(split, parts, strict=True)
    ] == [True] * 4
    held = {text for _, side in split for text in side}
    assert held == set(halves(spec)[1])  # on whichever part a record is


def test_another_data_set_may_be_what_is_held_out(tmp_path):
    whole = write(tmp_path / "a.jsonl", [row(1)])
    other = write(tmp_path / "b.jsonl", [row(2)])
    train, held = Holdout.of(other.uri).parts(whole)
    assert (train, held) == (whole, other)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "nan", "-0.1", "0.1:", "notes", ""])
def test_what_is_no_holdout_is_refused(text):
    with pytest.raises(BadHoldout, match="a holdout"):
        Holdout.of(text)


@pytest.mark.parametrize("text", ["0.1", "0.25:patient_id", "jsonl:/data/held.jsonl"])
def test_a_holdout_is_written_as_it_is_read(text):
    assert str(Holdout.of(text)) == text


def test_a_part_without_a_share_is_refused(tmp_path):
    spec = replace(write(tmp_path / "a.jsonl", [row(1)]), part="train")
    with pytest.raises(BadSelection, match="a holdout of 0 is split off"):
        data.examples(spec, MODEL)


def test_training_never_sees_what_the_site_holds_out(assign, tmp_path):
    """The update of a split client is that of a client that has the other records alone."""
    words = [f"{'cat' if i % 2 else 'dog'} learns {i}" for i in range(40)]
    rows = [{"text": text, "label": text.split()[0]} for text in words]
    whole = assign(rows, steps=None, num_examples=0)
    train, _ = Holdout.of("0.3").parts(whole.data)
    key = Site(whole.site).data_key()
    kept = {e.text for e in data.examples(train, whole.model, key)}
    assert 0 < len(kept) < len(rows)
    alone = tmp_path / "kept.jsonl"
    alone.write_text("".join(json.dumps(r) + "\n" for r in rows if r["text"] in kept))
    left = perform(replace(whole, data=DataSpec(f"jsonl:{alone}")))
    split = perform(replace(whole, data=train))
    assert split.num_examples == len(kept)
    assert split.fingerprint == left.fingerprint
    assert all(split.tensors[n].equal(left.tensors[n]) for n in split.tensors)
    assert Path(whole.site, "data.key").stat().st_mode & 0o077 == 0
