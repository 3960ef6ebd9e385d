"""Updates travel as canonical bytes, and nothing but an update is read back."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from clients.wire import BadUpdate, digest, pack, unpack
from strategies.base import Update
from strategies.spends import PrivacySpend

UPDATE = Update(
    client="clinic-7",
    round=3,
    base="f" * 64,
    tensors={
        "q.lora_B.weight": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        "head.bias": torch.arange(3).to(torch.bfloat16),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
    },
    num_examples=12,
    metrics={"loss": 0.1 + 0.2},
    memory={"ewc/q.fisher": torch.ones(2)},
    spends=(PrivacySpend("gaussian", "example", "add-remove", {"steps": 3.0}),),
    fingerprint="abc",
)


def header(**changes) -> bytes:
    """Return an update's bytes with another header."""
    data = pack(UPDATE)
    length = int.from_bytes(data[:8], "little")
    own = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["update"])
    text = json.dumps({k: v for k, v in (own | changes).items() if v is not ...})
    return save({"tensors/x": torch.ones(1)}, metadata={"update": text})


def test_an_update_comes_back_as_it_was():
    again = unpack(pack(UPDATE))

    for part in ("tensors", "memory"):
        ours, theirs = getattr(UPDATE, part), getattr(again, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert all(ours[n].dtype == theirs[n].dtype for n in ours)
    assert replace(again, tensors={}, memory={}) == replace(UPDATE, tensors={}, memory={})


def test_equal_updates_are_equal_bytes_whatever_their_layout():
    tensors = {n: UPDATE.tensors[n] for n in reversed(UPDATE.tensors)}
    tensors["q.lora_B.weight"] = tensors["q.lora_B.weight"].T.contiguous().T

    assert pack(replace(UPDATE, tensors=tensors)) == pack(UPDATE) == pack(unpack(pack(UPDATE)))


def test_tensors_in_one_another_s_memory_are_the_same_bytes_as_copies():
    whole = torch.arange(6.0)
    parts = {"all": whole, "some": whole[2:4], "turned": whole.reshape(2, 3).T}
    shared = replace(UPDATE, tensors=parts, memory={"same": whole})
    copies = {name: tensor.clone() for name, tensor in parts.items()}

    assert pack(shared) == pack(replace(UPDATE, tensors=copies, memory={"same": whole.clone()}))


@pytest.mark.parametrize(
    "change",
    [
        {"client": "clinic-8"},
        {"num_examples": 13},
        {"spends": ()},
        {"fingerprint": "abd"},
        {"tensors": {**UPDATE.tensors, "head.bias": torch.zeros(3, dtype=torch.bfloat16)}},
    ],
)
def test_every_part_is_in_the_digest(change):
    assert digest(pack(replace(UPDATE, **change))) != digest(pack(UPDATE))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        b"garbage that is no update at all",
        pickle.dumps(UPDATE),
        pickle.dumps({"update": "x"}),
        save({"x": torch.ones(1)}),
        save({"x": torch.ones(1)}, metadata={"update": "{"}),
        save({"x": torch.ones(1)}, metadata={"update": "[]"}),
        save({"x": torch.ones(1)}, metadata={"update": "{}"}),
        save({"x": torch.ones(1)}, metadata={"update": '{"a":' * 50_000}),
        header(num_examples=float("inf")).replace(b"Infinity", b"1e999999"),
        header(round=float("inf")).replace(b"Infinity", b"1e999999"),
        pack(UPDATE)[:-1],
        pack(UPDATE)[:100],
        pack(UPDATE) + b"x",
        header(spends=[{"mechanism": "gaussian"}]),
        header(spends="x"),
        header(metrics=[1]),
        header(metrics={"loss": "low"}),
        header(num_examples="many"),
        header(client=...),
    ],
)
def test_bytes_that_are_no_update_are_refused(data):
    with pytest.raises(BadUpdate, match="the bytes are not an update"):
        unpack(data)


def test_a_pickle_is_not_run():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was run",))

    with pytest.raises(BadUpdate):
        unpack(pickle.dumps(Bomb()))


def test_another_format_is_refused_by_name():
    with pytest.raises(BadUpdate, match="format 'weft-update-9', expected 'weft-update-1'"):
        unpack(header(format="weft-update-9"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_neither_leaves_nor_arrives(value):
    with pytest.raises(ValueError, match="JSON"):
        pack(replace(UPDATE, metrics={"loss": value}))
    with pytest.raises(BadUpdate, match="a client leaves out what is not finite"):
        unpack(header(metrics={"loss": value}))


def test_a_number_that_only_python_reads_as_infinite_is_refused():
    with pytest.raises(BadUpdate, match=r"metric 'loss' is inf; a client leaves out"):
        unpack(header(metrics={"loss": float("inf")}).replace(b"Infinity", b"1e999999"))
