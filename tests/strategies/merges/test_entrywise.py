"""TIES, DARE and pruning against the same rules on dense products."""

import pytest
import torch
from torch.testing import assert_close

from strategies import entrywise
from strategies.merges.dare_linear import dare_linear
from strategies.merges.dare_ties import dare_ties
from strategies.merges.magnitude_prune import magnitude_prune
from strategies.merges.ties import ties

LAYERS = {"k": (9, 6), "q": (6, 10)}
WEIGHTS = [1.0, 0.5, -0.75]


@pytest.fixture
def adapters(make_adapter):
    return [
        make_adapter(seed, rank=rank, scaling=scaling, head=False, layers=LAYERS)
        for seed, rank, scaling in [(1, 1, 4.0), (2, 3, 0.5), (3, 2, 1.0)]
    ]


@pytest.fixture
def dense(adapters, products):
    return [products(adapter) for adapter in adapters]


def trimmed(changes, density, scope):
    """The largest share of each adapter's entries, of each layer or of all of them."""
    found = []
    for change in changes:
        whole = torch.cat([part.abs().flatten() for part in change.values()])
        least = whole.sort(descending=True).values[round(density * len(whole)) - 1]
        kept = {}
        for name, part in change.items():
            sizes = part.abs().flatten().sort(descending=True).values
            bound = sizes[round(density * len(sizes)) - 1] if scope == "layer" else least
            kept[name] = torch.where(part.abs() >= bound, part, 0.0)
        found.append(kept)
    return found


def ties_by_hand(parts, weights):
    votes = torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)])
    agrees = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
    counted = (agrees * torch.tensor(weights).abs()[:, None, None]).sum(0)
    return (votes * agrees).sum(0), counted


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("entries", [1, 2**20])
def test_ties_is_the_mean_of_the_trimmed_entries_that_agree(
    monkeypatch, adapters, dense, products, scope, entries
):
    monkeypatch.setattr(entrywise, "_ENTRIES", entries)
    merged = ties(adapters, WEIGHTS, density=0.3, scope=scope, scale=2.0, rank=10)
    parts = trimmed(dense, 0.3, scope)
    for layer in LAYERS:
        total, counted = ties_by_hand([part[layer] for part in parts], WEIGHTS)
        expected = 2 * torch.where(counted > 0, total / counted, 0.0)
        assert_close(products(merged)[layer].float(), expected.float(), rtol=1e-5, atol=1e-5)
    assert merged.metrics["captured_energy"] == pytest.approx(1)


def test_an_entry_whose_votes_cancel_is_0(make_adapter, products):
    adapter = make_adapter(head=False, layers=LAYERS)
    merged = ties([adapter, adapter], [1.0, -1.0], density=1.0)
    assert not products(merged)["q"].any()


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_pruning_sums_the_largest_entries(adapters, dense, products, scope):
    merged = magnitude_prune(adapters, WEIGHTS, density=0.4, scope=scope, energy=1.0)
    parts = trimmed(dense, 0.4, scope)
    for layer in LAYERS:
        expected = sum(w * part[layer] for w, part in zip(WEIGHTS, parts, strict=True))
        assert_close(products(merged)[layer].float(), expected.float(), rtol=1e-5, atol=1e-5)


def test_dare_keeps_a_share_of_the_entries_and_makes_them_grow(make_adapter, products):
    adapter = make_adapter(head=False, layers={"q": (40, 50)})
    before = products(adapter)["q"]
    after = products(dare_linear([adapter], [1.0], density=0.25, rank=40))["q"]
    kept = after.abs() > 1e-3 * before.abs()
    assert 0.2 < kept.double().mean() < 0.3
    assert_close(after[kept], before[kept] * 4, rtol=1e-3, atol=1e-3)


def test_dare_on_average_over_seeds_is_the_sum(make_adapter, products):
    one, two = (make_adapter(seed, head=False, layers={"q": (5, 6)}) for seed in (1, 2))
    exact = products(one)["q"] + products(two)["q"]
    merges = [dare_linear([one, two], [1.0, 1.0], seed=seed, rank=5) for seed in range(300)]
    mean = torch.stack([products(merged)["q"] for merged in merges]).mean(0)
    spread = (products(one)["q"] ** 2 + products(two)["q"] ** 2).sqrt() / 300**0.5
    assert ((mean - exact).abs() < 4.5 * spread).all()


def test_the_seed_decides_what_dare_drops_and_the_order_of_adapters_does_not(adapters, products):
    def made(seed, order=(0, 1, 2)):
        chosen = [adapters[i] for i in order]
        return products(dare_ties(chosen, [WEIGHTS[i] for i in order], seed=seed, rank=10))["q"]

    assert torch.equal(made(3), made(3))
    assert not torch.allclose(made(3), made(4))
    assert_close(made(3), made(3, (2, 0, 1)), rtol=1e-5, atol=1e-5)


def test_dare_ties_sums_the_dropped_entries_that_agree(adapters, products):
    dropped = [products(dare_linear([one], [1.0], seed=7, rank=10)) for one in adapters]
    merged = dare_ties(adapters, WEIGHTS, seed=7, rank=10)
    for layer in LAYERS:
        parts = [torch.where(p[layer].abs() > 1e-4, p[layer], 0.0) for p in dropped]
        expected, _ = ties_by_hand(parts, WEIGHTS)
        assert_close(products(merged)[layer].float(), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sides", [(60, 90), (90, 60)])
def test_a_layer_too_large_for_its_gram_matrix_gets_nearly_the_nearest_product(
    monkeypatch, make_adapter, products, sides
):
    adapters = [make_adapter(seed, head=False, layers={"q": sides}) for seed in range(3)]
    exact = magnitude_prune(adapters, [1.0] * 3, rank=6)
    monkeypatch.setattr(entrywise, "_GRAM", 8)
    found = magnitude_prune(adapters, [1.0] * 3, rank=6)
    share, best = found.metrics["captured_energy"], exact.metrics["captured_energy"]
    assert best * 0.995 < share <= best + 1e-9
    whole = magnitude_prune(adapters, [1.0] * 3, rank=60)
    change = (products(whole)["q"] - products(found)["q"]).norm() / products(whole)["q"].norm()
    assert 1 - float(change) ** 2 == pytest.approx(share, abs=1e-5)


def test_a_share_of_the_energy_is_found_without_the_whole_product(monkeypatch, make_adapter):
    """Neither the product nor anything of its size is decomposed: what is kept, and one more."""
    adapters = [make_adapter(seed, head=False, layers={"q": (50, 40)}) for seed in (1, 2)]
    exact = magnitude_prune(adapters, [1.0, 1.0], density=0.5, rank=40)
    sizes, real = [], torch.linalg.svd

    def watched(matrix, **options):
        sizes.append(matrix.shape)
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    found = magnitude_prune(adapters, [1.0, 1.0], density=0.5, energy=0.6)
    rank = len(found["q.lora_A.weight"])
    assert 1 < rank < 20
    assert sizes == [(50, rank + 1)]
    squares = exact["q.lora_B.weight"].double().square().sum(0)
    shares = squares.cumsum(0) / squares.sum()
    assert shares[rank - 2] < 0.6 <= shares[rank - 1]
    assert found.metrics["captured_energy"] == pytest.approx(float(shares[rank - 1]), abs=1e-5)
