"""The digest of an assignment, to which noise is bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients import digests as module
from clients.assignment import DataSpec, Shard
from strategies.base import Broadcast


@pytest.fixture
def hashed(monkeypatch):
    """The tensors that have been read for a digest."""
    seen: list[torch.Tensor] = []
    honest = module._hashed
    monkeypatch.setattr(module, "_hashed", lambda tensor: seen.append(tensor) or honest(tensor))
    return seen


@pytest.fixture
def sent():
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def test_tensors_that_assignments_share_are_hashed_once_and_to_the_same_digest(
    assign, sent, hashed
):
    asked = [assign(broadcast=Broadcast(dict(sent)), client=f"c-{n}") for n in range(3)]
    alone = [
        replace(a, broadcast=Broadcast({n: t.clone() for n, t in sent.items()})).digest()
        for a in asked
    ]
    hashed.clear()

    assert [a.digest() for a in asked] == alone
    assert len(set(alone)) == 3
    assert len(hashed) == len(sent)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t[0].zero_(),
        lambda t: t.view(-1).mul_(2),
        lambda t: t.detach().copy_(torch.full_like(t, 7)),
    ],
    ids=["itself", "a-part", "a-view", "detached"],
)
def test_a_tensor_that_was_written_to_is_hashed_anew(assign, sent, write):
    asked = assign(broadcast=Broadcast(sent))
    before = asked.digest()

    write(sent["a"])

    now = replace(asked, broadcast=Broadcast({n: t.clone() for n, t in sent.items()}))
    assert asked.digest() == now.digest() != before


def test_another_tensor_in_the_place_of_one_that_is_gone_has_a_digest_of_its_own(assign):
    found, remembered = set(), len(module._DIGESTS)
    for value in range(20):
        asked = assign(broadcast=Broadcast({"a": torch.full((1000,), float(value))}))
        found.add(asked.digest())
        del asked

    assert len(found) == 20
    assert len(module._DIGESTS) == remembered


def test_a_site_that_calls_data_and_model_by_other_names_finds_the_same_digest(assign):
    made = assign(data=DataSpec("site:notes", unit="patient"))
    asked = replace(made, model=replace(made.model, hash="a" * 64))
    there = DataSpec("csv:/data/x.csv", {"text": "note"}, unit="patient")
    own = replace(asked.model, id="/models/tiny", revision="v1")

    assert asked.digest() == replace(asked, data=there, model=own, site="/site").digest()


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "patient"},
        {"labels": ("cat",)},
        {"shard": Shard("iid", total=2)},
        {"shard": Shard("iid", index=1, total=2)},
        {"part": "train", "holdout": 0.1},
    ],
    ids=str,
)
def test_which_records_of_the_data_are_meant_is_in_the_digest(assign, change):
    asked = assign(data=DataSpec("site:notes", shard=None))
    other = replace(asked, data=replace(asked.data, **change))

    assert asked.digest() != other.digest()


def test_a_model_is_known_by_its_hash_and_by_its_id_where_it_has_none(assign):
    asked = assign()
    by_id = replace(asked, model=replace(asked.model, id="another"))
    by_hash = replace(asked, model=replace(asked.model, hash="a" * 64))

    assert len({asked.digest(), by_id.digest(), by_hash.digest()}) == 3
    assert by_hash.digest() != replace(by_id, model=replace(by_id.model, hash="b" * 64)).digest()


def test_the_same_bytes_as_another_type_or_shape_are_another_assignment(assign):
    zeros = torch.zeros(8)
    asked = [zeros, zeros.reshape(2, 4), zeros.view(torch.int32), torch.zeros(9), zeros[:0]]

    assert len({assign(broadcast=Broadcast({"a": t})).digest() for t in asked}) == len(asked)
