"""MagMax: the largest entries, and how much of them a rank keeps."""

import pytest
import torch
from torch.testing import assert_close

from strategies import entrywise
from strategies.merges.magmax import magmax

LAYER = "encoder.query"


def dense(*rows, scaling=1.0):
    """An adapter whose product is ``scaling`` times these rows."""
    return {
        "q.lora_A.weight": torch.tensor(rows),
        "q.lora_B.weight": torch.eye(len(rows)),
        "q.scaling": torch.tensor(scaling),
    }


def chosen(products):
    """The entry of largest magnitude of several matrices, entry by entry."""
    stack = torch.stack(products)
    return stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]


def test_of_every_entry_the_largest_change_is_kept(products):
    one, two = dense([1.0, -4.0, 0.0], [2.0, 2.0, 2.0]), dense([-3.0, 1.0, 0.5], [0.0, -2.5, 2.0])
    merged = magmax([one, two], [1.0, 1.0])
    assert_close(products(merged)["q"].float(), torch.tensor([[-3.0, -4.0, 0.5], [2.0, -2.5, 2.0]]))
    assert merged.metrics == pytest.approx({"captured_energy": 1, "captured_energy/q": 1})


def test_of_opposite_changes_of_one_size_the_positive_counts_in_either_order(products):
    one, two = dense([1.0, -2.0]), dense([-1.0, 2.0])
    for adapters in ([one, two], [two, one]):
        assert_close(
            products(magmax(adapters, [1.0, 1.0]))["q"].float(), torch.tensor([[1.0, 2.0]])
        )


def test_weights_count_by_their_ratios_and_the_scale_multiplies(products):
    one, two = dense([1.0, 3.0]), dense([2.0, 2.0])
    merged = magmax([one, two], [4.0, 1.0], scale=0.5)  # 4 of 4 and 12 of 2, over 4, by half
    assert_close(products(merged)["q"].float(), torch.tensor([[0.5, 1.5]]))


@pytest.mark.parametrize("entries", [1, 30, 2**20])
@pytest.mark.parametrize("sides", [(6, 9), (9, 6)])
def test_a_rank_keeps_the_nearest_product_whatever_the_blocks(
    monkeypatch, make_adapter, products, entries, sides
):
    monkeypatch.setattr(entrywise, "_ENTRIES", entries)
    adapters = [
        make_adapter(seed, rank=2, scaling=seed, head=False, layers={"q": sides}) for seed in (1, 2)
    ]
    exact = chosen([products(one)["q"] for one in adapters]).double()
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    for rank in (1, 3):
        merged = magmax(adapters, [1.0, 1.0], rank=rank)
        assert merged["q.lora_A.weight"].shape[0] == rank
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert_close(products(merged)["q"].double(), nearest, rtol=1e-4, atol=1e-5)
        share = float(s[:rank].square().sum() / s.square().sum())
        assert merged.metrics["captured_energy"] == pytest.approx(share)


def test_an_energy_keeps_the_smallest_rank_that_reaches_it(make_adapter, products):
    adapters = [make_adapter(seed, rank=2, head=False, layers={"q": (8, 10)}) for seed in (1, 2)]
    s = torch.linalg.svdvals(chosen([products(one)["q"] for one in adapters]).double()).square()
    reached = (s.cumsum(0) / s.sum()).tolist()
    merged = magmax(adapters, [1.0, 1.0], energy=0.9)
    assert len(merged["q.lora_A.weight"]) == next(i for i, x in enumerate(reached, 1) if x >= 0.9)
    assert merged.metrics["captured_energy"] >= 0.9


def test_a_layer_that_one_adapter_has_alone_is_its_own(make_adapter, products):
    one, two = make_adapter(1, head=False), make_adapter(2, head=False)
    alone = {name: t for name, t in two.items() if not name.startswith(LAYER)}
    merged = magmax([one, alone], [1.0, 1.0])
    assert_close(products(merged)[LAYER], products(one)[LAYER], rtol=1e-5, atol=1e-5)
