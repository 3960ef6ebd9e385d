"""How much of a sum a merge keeps."""

import pytest
import torch

from strategies.energy import captured_energy
from strategies.merges.cat import cat
from strategies.merges.svd import svd
from strategies.merges.ties import ties

WEIGHTS = [1.0, -0.5, 2.0]


@pytest.fixture
def adapters(make_adapter):
    return [make_adapter(seed, rank=2, scaling=seed, head=False) for seed in (1, 2, 3)]


def test_of_the_exact_sum_it_is_all_whatever_its_length(adapters):
    merged = cat(adapters, [w / 3 for w in WEIGHTS])
    shares = captured_energy(adapters, WEIGHTS, merged)
    assert shares.keys() == {
        "captured_energy",
        "captured_energy/encoder.query",
        "captured_energy/encoder.value",
    }
    assert all(share == pytest.approx(1) for share in shares.values())


def test_of_a_cut_it_is_the_share_of_squared_singular_values(adapters):
    merged = svd(adapters, WEIGHTS, rank=2)
    assert captured_energy(adapters, WEIGHTS, merged) == pytest.approx(merged.metrics)
    assert merged.metrics["captured_energy"] < 0.99


def test_of_any_other_it_is_the_squared_cosine(adapters, products):
    merged = ties(adapters, WEIGHTS, rank=12)
    total = sum(w * products(x)["encoder.query"] for w, x in zip(WEIGHTS, adapters, strict=True))
    made = products(merged)["encoder.query"]
    cosine = (total * made).sum() / (total.norm() * made.norm())
    share = captured_energy(adapters, WEIGHTS, merged)["captured_energy/encoder.query"]
    assert share == pytest.approx(float(cosine) ** 2)


def test_a_layer_that_the_merge_has_not_is_lost_and_of_nothing_all_is_kept(adapters):
    merged = {n: t for n, t in cat(adapters, WEIGHTS).items() if n.startswith("encoder.query")}
    assert captured_energy(adapters, WEIGHTS, merged)["captured_energy/encoder.value"] == 0
    zero = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in adapters[0].items()}
    assert captured_energy([zero], [1.0], zero)["captured_energy"] == 1
