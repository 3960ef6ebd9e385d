"""A join file says what a node offers, is signed by its key, and is believed only where it is."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.node.identity import new_key
from clients.node.joining import MOST_BYTES, BadJoin, Offer, Statement, read_join, write_join

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return [new_key(folder / name) for name in ("first", "second", "third")]


@pytest.fixture
def say(keys):
    """Return a function that makes a statement by the first key."""

    def make(**changes):
        offer = Offer(
            examples=5300, fields=("label", "text"), population="north", epsilon=8, delta=1e-5
        )
        said = {
            "format": "weft-join-1",
            "name": "clinic-north",
            "public_key": keys[0].public.text,
            "data": {"notes": offer},
            "labels": {"region": "north"},
            "models": ("ab" * 32,),
            "weft": "0.1.0",
            "flwr": "1.41.0",
            "made": NOW,
            "expires": NOW + timedelta(days=365),
        }
        return Statement(**(said | changes))

    return make


def test_a_join_file_comes_back_as_it_was_said(say, keys):
    text = write_join(say(), keys[0])

    found = read_join(text.encode(), NOW + timedelta(days=1))

    assert (found.statement, found.key, found.previous) == (say(), keys[0].public, None)
    assert found.document == json.loads(text)
    assert len(text) < 2_000


def test_a_reformatted_file_is_the_same_file(say, keys):
    document = json.loads(write_join(say(), keys[0]))
    again = json.dumps(dict(reversed(document.items())), indent=8).encode()
    assert read_join(again, NOW).statement == say()


def test_a_client_is_called_as_its_node_unless_that_has_several_data_sets(say, keys):
    one = read_join(write_join(say(), keys[0]).encode(), NOW)
    offer = one.statement.data["notes"]
    two = read_join(write_join(say(data={"notes": offer, "letters": offer}), keys[0]).encode(), NOW)
    assert one.client("notes") == "clinic-north"
    assert two.client("notes") == "clinic-north.notes"


def test_a_new_key_is_signed_by_the_old_one_too(say, keys):
    said = say(public_key=keys[1].public.text, previous=keys[0].public.text)

    found = read_join(write_join(said, keys[1], keys[0]).encode(), NOW)

    assert (found.key, found.previous) == (keys[1].public, keys[0].public)


def test_a_new_key_without_the_old_one_s_word_is_refused(say, keys):
    said = say(public_key=keys[1].public.text, previous=keys[0].public.text)
    document = json.loads(write_join(said, keys[1], keys[0]))
    del document["signatures"][keys[0].public.fingerprint]
    with pytest.raises(BadJoin, match="signed by the keys that it names"):
        read_join(json.dumps(document).encode(), NOW)

    forged = json.loads(write_join(said, keys[1], keys[0]))
    mine = forged["signatures"][keys[1].public.fingerprint]
    forged["signatures"][keys[0].public.fingerprint] = mine
    with pytest.raises(BadJoin, match="is not over what it says"):
        read_join(json.dumps(forged).encode(), NOW)


def test_nothing_is_signed_in_another_key_s_name(say, keys):
    with pytest.raises(BadJoin, match="signed by the key that it names"):
        write_join(say(), keys[1])
    with pytest.raises(BadJoin, match="signed by the key that it names"):
        write_join(say(), keys[0], keys[1])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), "clinic-south"),
        (("data", "notes", "epsilon"), 80.0),
        (("data", "notes", "examples"), 99),
        (("expires",), "2030-01-01T00:00:00Z"),
        (("labels", "region"), "south"),
    ],
)
def test_a_word_that_was_changed_is_noticed(say, keys, path, value):
    document = json.loads(write_join(say(), keys[0]))
    place = document["statement"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BadJoin, match="it was changed since, or somebody else made it"):
        read_join(json.dumps(document).encode(), NOW)


def test_a_file_that_somebody_else_signed_is_refused(say, keys):
    document = json.loads(write_join(say(), keys[0]))
    other = json.loads(write_join(say(public_key=keys[2].public.text), keys[2]))
    document["signatures"] = other["signatures"]
    with pytest.raises(BadJoin, match="signed by the keys that it names"):
        read_join(json.dumps(document).encode(), NOW)


@pytest.mark.parametrize(
    ("later", "why"),
    [
        (timedelta(days=-1), "made at 2026-11-23 12:00 UTC, which is yet to come: set the clocks"),
        (timedelta(days=365), "it expired at 2027-11-23 12:00 UTC"),
    ],
)
def test_a_file_is_good_for_its_time(say, keys, later, why):
    with pytest.raises(BadJoin, match=why):
        read_join(write_join(say(), keys[0]).encode(), NOW + later)


def test_no_key_is_good_for_ever(say, keys):
    for_ever = write_join(say(expires=NOW + timedelta(days=4000)), keys[0]).encode()
    with pytest.raises(BadJoin, match="at most 3660 days"):
        read_join(for_ever, NOW)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("data", "notes", "uri"), "jsonl:/data/notes.jsonl", "data.notes.uri is nothing that it"),
        (("data", "notes", "examples"), 5312, "rounded to two digits"),
        (("data", "notes", "examples"), "5300", "data.notes.examples"),
        (("data", "notes", "examples"), 0, "data.notes.examples"),
        (("data", "notes", "delta"), None, "give both or neither"),
        (("data", "notes", "epsilon"), -1, "data.notes.epsilon"),
        (("data", "notes", "units"), 40, "give both or neither"),
        (("data", "notes", "unit"), "patient_id", "give both or neither"),
        (("data", "more"), {"examples": 1, "population": "north"}, "share a budget"),
        (("data", "../../etc"), {"examples": 1, "population": "p"}, "data"),
        (("data",), {}, "data"),
        (("name",), "Clinic North", "name"),
        (("name",), "north\n", "name"),
        (("name",), "n" * 64, "name"),
        (("labels", "region"), "\x1b[31mred", "it must be printable"),
        (("labels", "region"), "x" * 201, "labels.region"),
        (("public_key",), "ssh-rsa AAAA", "a node's public key is"),
        (("made",), "2026-11-23T12:00:00", "made"),
        (("format",), "weft-join-2", "its format is weft-join-1"),
        (("format",), ["a"], "its format is weft-join-1"),
    ],
)
def test_a_signed_statement_that_makes_no_sense_is_refused(say, keys, path, value, why):
    from clients.node.joining import _message

    document = json.loads(write_join(say(), keys[0]))
    place = document["statement"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    signature = keys[0].sign(_message(document["statement"]))
    document["signatures"] = {keys[0].public.fingerprint: signature}
    with pytest.raises(BadJoin, match=why) as raised:
        read_join(json.dumps(document).encode(), NOW)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"statement": {}, "signatures": []}',
        b'{"statement": [], "signatures": {}}',
        b'{"statement": {}, "signatures": {}, "more": 1}',
        b'{"statement": {"a": NaN}, "signatures": {}}',
        b'{"statement": {}, "statement": {}, "signatures": {}}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b" " * (MOST_BYTES + 1),
    ],
    ids=range(14),
)
def test_what_is_no_join_file_is_refused(data):
    with pytest.raises(BadJoin, match="this is no join file that can be used"):
        read_join(data, NOW)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_no_changed_byte_gets_through_as_another_statement(signed, position, byte):
    text, statement = signed
    changed = bytearray(text)
    changed[position % len(changed)] = byte
    try:
        found = read_join(bytes(changed), NOW)
    except BadJoin:
        return
    assert found.statement == statement


@pytest.fixture(scope="module")
def signed(keys):
    offer = Offer(examples=5300, fields=("text",), population="north")
    said = Statement(
        format="weft-join-1",
        name="north",
        public_key=keys[0].public.text,
        data={"notes": offer},
        weft="0.1.0",
        flwr="1.41.0",
        made=NOW,
        expires=NOW + timedelta(days=365),
    )
    return write_join(said, keys[0]).encode(), said
