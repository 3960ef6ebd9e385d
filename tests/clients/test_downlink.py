"""What a client does with a broadcast that leaves out what it holds."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.digests import tensor_digest
from clients.downlink import NotHeld, digests, expanded, without
from clients.site import Site
from strategies.base import Broadcast
from strategies.turning import rotated

A, B = "tensors/q.lora_A.weight", "tensors/q.lora_B.weight"
TURN = torch.tensor([[[0.6, 0.8], [-0.8, 0.6]]], dtype=torch.float64)


@pytest.fixture
def first():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    return Broadcast(
        {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.scaling": torch.tensor(2.0)},
        trainable=r".*lora_B.*",
        personal="head.*",
        mask={"q.lora_B.weight": torch.ones(6, 2)},
        extra={"variate": torch.zeros(3)},
    )


@pytest.fixture
def asked(tmp_path):
    def make(sent, round_=1, held=None):
        return Assignment(
            action="train",
            run="run-1",
            client="a",
            round=round_,
            base=f"version-{round_}",
            model=ModelSpec("some-model", "classification"),
            adapter=PluginChoice("lora"),
            broadcast=sent,
            data=DataSpec("jsonl:/a.jsonl"),
            optimizer=PluginChoice("sgd"),
            site=str(tmp_path / "site"),
            held=held,
        )

    return make


@pytest.fixture
def second(first):
    """The next broadcast: A turned, another B, all else as before."""
    a = rotated(TURN[0], first.tensors["q.lora_A.weight"])
    return replace(first, tensors={**first.tensors, "q.lora_A.weight": a, "q.lora_B.weight": TURN})


@pytest.fixture
def short(second, asked):
    """The second broadcast without what a client holds of the first."""
    out = {name: digest for name, digest in digests(second).items() if name != B}
    return asked(without(second, out, {A: TURN}), 2, out)


def kept(assignment):
    return Site(assignment.site).broadcast("run-1", "a")


def test_the_expanded_assignment_is_the_whole_one_to_the_bit(first, second, asked, short):
    expanded(asked(first, held={}))
    assert short.broadcast.tensors.keys() == {"q.lora_B.weight"}
    assert not short.broadcast.mask
    whole = expanded(short)
    assert whole.digest() == asked(second, 2).digest()
    assert whole.broadcast.extra.keys() == {"variate"}
    assert digests(whole.broadcast) == digests(second)


def test_a_second_try_finds_what_the_first_has_turned_already(first, asked, short):
    expanded(asked(first, held={}))
    assert expanded(short).digest() == expanded(short).digest()


def test_a_client_that_is_to_keep_nothing_keeps_nothing(first, asked):
    assignment = asked(first)
    assert expanded(assignment) is assignment
    assert kept(assignment) == {}


def test_a_digest_is_of_a_whole_broadcast(short):
    with pytest.raises(ValueError, match="leaves out 4 tensors"):
        short.digest()


def test_a_client_without_its_folder_says_that_it_holds_nothing(short):
    with pytest.raises(NotHeld, match=r"holds no .*; send it whole"):
        expanded(short)
    assert kept(short) == {}


def test_a_file_that_cannot_be_read_counts_for_nothing(first, asked, short, tmp_path):
    expanded(asked(first, held={}))
    [path] = (tmp_path / "site").rglob("broadcast.safetensors")
    path.write_bytes(b"no tensors")
    with pytest.raises(NotHeld):
        expanded(short)


@pytest.mark.parametrize(
    "other",
    [
        lambda t: t + 1,
        lambda t: t.double(),
        lambda t: t[:1],
        lambda t: t.reshape(-1),
        lambda t: t.int(),
    ],
    ids=["values", "dtype", "rows", "shape", "integers"],
)
def test_what_is_kept_and_is_not_what_is_meant_is_not_trained_from(first, asked, short, other):
    expanded(asked(first, held={}))
    before = kept(short)
    Site(short.site).store_broadcast("run-1", "a", {**before, A: other(before[A])})
    with pytest.raises(NotHeld, match="is not the one that was left out"):
        expanded(short)
    assert tensor_digest(kept(short)[A]) == tensor_digest(other(before[A]))  # nothing new is kept


@pytest.mark.parametrize(
    "turn", [TURN[0], TURN * 2, torch.zeros(1, 3, 3), TURN.int(), torch.zeros(0, 2, 2)]
)
def test_a_rotation_that_does_not_lead_to_the_digest_is_refused(first, asked, short, turn):
    expanded(asked(first, held={}))
    extra = {name: turn if name.endswith(A) else t for name, t in short.broadcast.extra.items()}
    with pytest.raises(NotHeld, match="is not the one that was left out"):
        expanded(replace(short, broadcast=replace(short.broadcast, extra=extra)))
