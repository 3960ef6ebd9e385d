"""Which ranks are chosen by a budget, and how they travel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.selection import (
    Budget,
    asking,
    budget_of,
    chosen,
    compact,
    expanded,
    mask_of,
    num_ranks,
    refusal_of,
)
from strategies.uplink import BadEncoding

A, B = "q.lora_A.weight", "q.lora_B.weight"
NUM = 8  # two layers of rank 4


def moved(adapter, factor, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + torch.randn(t.shape, generator=generator)
        for n, t in sorted(adapter.items())
        if f".lora_{factor}." in n
    }


@pytest.fixture
def adapter(make_adapter):
    return make_adapter(head=False)


def test_a_rank_counts_by_the_norm_of_what_it_changed():
    """|dB_i| |A_i| is 3, 4, 0 for the one layer, and 2 * 2.5 for the other, whose scaling is 2."""
    one = torch.ones(())
    sent = {
        "k.lora_A.weight": torch.tensor([[2.5, 0.0]]),
        "k.lora_B.weight": torch.zeros(2, 1),
        "k.scaling": 2 * one,
        A: torch.tensor([[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]]),
        B: torch.zeros(2, 3),
        "q.scaling": one,
    }
    trained = {
        "k.lora_B.weight": torch.tensor([[0.0], [-1.0]]),
        B: torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    found = {n: chosen(sent, trained, n) for n in (1, 2, 3)}
    assert [f["k.lora_B.weight"].tolist() for f in found.values()] == [[True]] * 3
    assert found[1][B].tolist() == [False, False, False]
    assert found[2][B].tolist() == [False, True, False]
    assert found[3][B].tolist() == [True, True, False]


def test_a_round_that_trains_a_counts_by_the_length_of_b():
    sent = {A: torch.zeros(2, 3), B: torch.tensor([[1.0, 5.0]]), "q.scaling": torch.ones(())}
    trained = {A: torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    assert chosen(sent, trained, 1)[A].tolist() == [False, True]


def test_of_equal_ranks_the_first_is_chosen(adapter):
    still = {n: t for n, t in adapter.items() if ".lora_B." in n}
    found = chosen(adapter, still, 5)
    assert [m.tolist() for m in found.values()] == [[True] * 4, [True, False, False, False]]


@settings(deadline=None, max_examples=30)
@given(ranks=st.integers(1, NUM), factor=st.sampled_from("AB"), seed=st.integers(0, 99))
def test_what_travels_keeps_the_budget_and_puts_all_else_back_as_it_was(ranks, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for layer, (out, width) in {"k": (5, 3), "q": (7, 6)}.items():
        adapter[f"{layer}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        adapter[f"{layer}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
        adapter[f"{layer}.scaling"] = torch.tensor(2.0)
    trained = {**moved(adapter, factor, seed), "head.bias": torch.ones(3)}
    picked = chosen(adapter, trained, ranks)
    assert num_ranks(adapter) == NUM
    assert sum(int(m.sum()) for m in picked.values()) == ranks

    sent = compact(trained, picked)
    assert refusal_of(sent, Budget(ranks, 0.5), adapter) is None
    whole = expanded(sent, adapter)
    assert whole.keys() == trained.keys()
    for name, mask in picked.items():
        entries = mask_of(name, mask, adapter[name])
        assert torch.equal(whole[name], torch.where(entries, trained[name], adapter[name]))
    size, all_of_it = (sum(t.nbytes for t in part.values()) for part in (sent, trained))
    assert size < all_of_it or ranks > NUM / 2


def test_more_ranks_than_the_budget_are_refused(adapter):
    trained = moved(adapter, "B")
    sent = compact(trained, chosen(adapter, trained, 3))
    assert refusal_of(sent, Budget(2, 0.5), adapter) == "it holds 3 ranks, and its budget is 2"
    assert "it holds 8 ranks" in refusal_of(trained, Budget(7, 0.5), adapter)
    assert refusal_of({"head.bias": torch.ones(3)}, Budget(1, 0.5), adapter) is None


NAME = "encoder.query.lora_B.weight"
ODD = {
    "another number": (torch.tensor([0], dtype=torch.int32), r"\[7, 2\], expected .*\[7, 1\]"),
    "twice": (torch.tensor([1, 1], dtype=torch.int32), "ascending ranks from 0 to 3"),
    "beyond": (torch.tensor([0, 4], dtype=torch.int32), "ascending ranks from 0 to 3"),
    "negative": (torch.tensor([-1, 2], dtype=torch.int32), "ascending ranks from 0 to 3"),
    "no list": (torch.tensor(1, dtype=torch.int32), "ascending ranks from 0 to 3"),
    "no numbers of places": (torch.tensor([0.0, 1.0]), "ascending ranks from 0 to 3"),
}


@pytest.mark.parametrize("odd", ODD)
def test_ranks_that_the_adapter_has_not_are_refused(odd, adapter):
    places, reason = ODD[odd]
    sent = {NAME: adapter[NAME][:, :2], f"{NAME}:ranks": places}
    with pytest.raises(BadEncoding, match=reason):
        expanded(sent, adapter)


@pytest.mark.parametrize("name", ["head.bias", "nothing"])
def test_ranks_of_what_is_no_factor_are_refused(name, adapter):
    sent = {name: torch.ones(1), f"{name}:ranks": torch.tensor([0], dtype=torch.int32)}
    with pytest.raises(BadEncoding, match=f"{name}:ranks is not asked for"):
        expanded(sent, adapter)


def test_the_same_budget_is_the_same_tensors():
    one, other = asking(Budget(8, 0.25)), asking(Budget(8, 0.25))
    assert all(one[n] is other[n] for n in one)
    assert budget_of({}) is None
