"""EigenLoRAx: one basis for all adapters."""

import pytest
import torch
from torch.testing import assert_close

from strategies.merges.eigenlorax import eigenlorax
from strategies.shared import share
from strategies.terms import merge_terms

LAYER = "encoder.query"


@pytest.fixture
def adapters(make_adapter):
    return [make_adapter(seed, rank=2, scaling=seed, head=False) for seed in (1, 2, 3)]


def test_all_directions_give_the_exact_sum(adapters, products):
    merged = eigenlorax(adapters, [1.0, -0.5, 2.0], energy=1.0)
    parts = [products(one)[LAYER] for one in adapters]
    expected = parts[0] - 0.5 * parts[1] + 2 * parts[2]
    assert_close(products(merged)[LAYER], expected, rtol=1e-5, atol=1e-5)
    assert all(share == pytest.approx(1) for share in merged.metrics.values())


def test_a_few_directions_keep_of_each_adapter_what_the_metrics_say(adapters, products):
    layers = merge_terms(adapters, [1.0] * 3)
    found = share(layers, rank=3)
    for number, adapter in enumerate(adapters):
        kept = whole = 0.0
        again = products(found.member(number, layers))
        for layer, product in products(adapter).items():
            whole += float(product.square().sum())
            kept += float(product.square().sum() - (product - again[layer]).square().sum())
        assert found.metrics[f"captured_energy_of/{number}"] == pytest.approx(kept / whole)
        assert 0 < kept < whole


def test_the_basis_is_orthonormal_and_one_for_all_tasks(adapters):
    one = share(merge_terms(adapters, [1.0] * 3), rank=3).layers[LAYER]
    assert (one.b.shape, one.a.shape, len(one.cores)) == ((7, 3), (3, 12), 3)
    assert_close(one.b.T @ one.b, torch.eye(3, dtype=torch.float64))
    assert_close(one.a @ one.a.T, torch.eye(3, dtype=torch.float64))


def test_adapters_that_cancel_in_the_sum_still_share_their_basis(adapters):
    one = share(merge_terms([adapters[0], adapters[0]], [1.0, -1.0]), rank=2)
    assert one.metrics["captured_energy"] == pytest.approx(1)
    zero = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in adapters[0].items()}
    assert not eigenlorax([zero, zero], [1.0, 1.0])[f"{LAYER}.lora_B.weight"].any()
