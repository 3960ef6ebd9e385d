"""The digest of an assignment, to which noise is bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients import digests as module
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


def test_the_same_bytes_as_another_type_or_shape_are_another_assignment(assign):
    zeros = torch.zeros(8)
    asked = [zeros, zeros.reshape(2, 4), zeros.view(torch.int32), torch.zeros(9), zeros[:0]]

    assert len({assign(broadcast=Broadcast({"a": t})).digest() for t in asked}) == len(asked)
