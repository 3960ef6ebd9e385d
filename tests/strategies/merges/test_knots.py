"""KnOTS against the paper's steps on dense products."""

import pytest
import torch
from torch.testing import assert_close

from strategies.merges.knots import knots

LAYER = "encoder.query"


@pytest.fixture
def adapters(make_adapter):
    return [
        make_adapter(seed, rank=rank, scaling=scaling, head=False)
        for seed, rank, scaling in [(1, 1, 4.0), (2, 3, 0.5)]
    ]


def test_with_everything_kept_and_nothing_opposed_it_is_the_mean(make_adapter, products):
    adapter = make_adapter(head=False)
    larger = {n: t * 3 if n.endswith(".scaling") else t for n, t in adapter.items()}
    merged = knots([adapter, larger], [1.0, 1.0], density=1.0)
    assert_close(products(merged)[LAYER], 2 * products(adapter)[LAYER], rtol=1e-5, atol=1e-5)


def test_it_is_ties_on_the_right_factors_of_all_side_by_side(adapters, products):
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    dense = [products(one)[LAYER] for one in adapters]
    u, s, vh = torch.linalg.svd(torch.cat(dense, dim=1), full_matrices=False)
    parts = torch.stack((s[:4, None] * vh[:4]).split(dense[0].shape[1], dim=1))
    kept = []
    for part in parts:
        sizes = part.abs().flatten().sort(descending=True).values
        bound = sizes[round(0.4 * len(sizes)) - 1]
        kept.append(torch.where(part.abs() >= bound * (1 - 1e-6), part, 0.0))
    votes = torch.stack(kept) * weights[:, None, None]
    agrees = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
    counted = (agrees * weights[:, None, None]).sum(0)
    mean = torch.where(counted > 0, (votes * agrees).sum(0) / counted, 0.0)
    merged = knots(adapters, weights.tolist(), density=0.4, scope="layer")
    assert_close(products(merged)[LAYER], u[:, :4] @ mean, rtol=1e-4, atol=1e-4)


def test_its_rank_is_that_of_all_adapters_and_a_lower_one_says_what_it_keeps(adapters):
    whole, low = knots(adapters, [1.0, 1.0]), knots(adapters, [1.0, 1.0], rank=2)
    assert len(whole[f"{LAYER}.lora_A.weight"]) == 4
    assert whole.metrics["captured_energy"] == pytest.approx(1)
    assert len(low[f"{LAYER}.lora_A.weight"]) == 2
    assert 0 < low.metrics["captured_energy"] < 1
