import pytest
import torch
from torch.testing import assert_close

from strategies.merges import MERGES
from strategies.merges.svd import svd
from strategies.plugins import BadOptions

LAYER = "encoder.query"
A = f"{LAYER}.lora_A.weight"


@pytest.fixture
def adapters(make_adapter):
    return [
        make_adapter(seed, rank=rank, scaling=scaling, dtype=torch.float64, head=False)
        for seed, rank, scaling in [(1, 1, 4.0), (2, 3, 2.0)]
    ]


@pytest.fixture
def exact(adapters, products):
    return 0.3 * products(adapters[0])[LAYER] + 0.7 * products(adapters[1])[LAYER]


def diagonal(*values):
    """An adapter whose product is diagonal: its singular values are ``values``."""
    return {
        "q.lora_A.weight": torch.eye(len(values)),
        "q.lora_B.weight": torch.diag(torch.tensor(values)),
        "q.scaling": torch.tensor(1.0),
    }


def test_a_sufficient_rank_gives_the_exact_sum(adapters, exact, products):
    assert_close(products(svd(adapters, [0.3, 0.7], rank=4))[LAYER], exact)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_smaller_rank_gives_the_nearest_product_of_that_rank(adapters, exact, products, rank):
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    merged = svd(adapters, [0.3, 0.7], rank=rank)
    assert merged[A].shape[0] == rank
    assert_close(products(merged)[LAYER], (u[:, :rank] * s[:rank]) @ vh[:rank])


def test_the_default_rank_is_the_largest_of_the_adapters(adapters):
    assert svd(adapters, [0.3, 0.7])[A].shape[0] == 3


def test_a_rank_beyond_the_sum_of_ranks_adds_nothing(adapters):
    assert svd(adapters, [0.3, 0.7], rank=64)[A].shape[0] == 4


def test_a_stack_wider_than_the_layer_is_cut_to_the_layer(make_adapter, products):
    many = [make_adapter(seed, dtype=torch.float64, head=False) for seed in range(5)]
    merged = svd(many, [0.2] * 5, rank=64)
    assert merged[A].shape[0] == 7  # the layer is [7, 12]
    assert_close(products(merged)[LAYER], sum(0.2 * products(x)[LAYER] for x in many))


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.79, 1), (0.8, 2), (0.99, 2), (0.9999, 3), (1.0, 3)]
)
def test_energy_is_the_share_of_squared_singular_values_that_is_kept(energy, rank):
    # squares 16, 4, 0.16 and 0 of 20.16: shares 0.794, 0.992, 1, 1
    shares = svd([diagonal(4.0, 2.0, 0.4, 0.0)], [1.0], energy=energy)
    assert shares["q.lora_A.weight"].shape[0] == rank


def test_rank_caps_energy():
    merged = svd([diagonal(4.0, 2.0, 0.5)], [1.0], energy=1.0, rank=2)
    assert merged["q.lora_A.weight"].shape[0] == 2


def test_full_energy_of_copies_keeps_the_rank_of_one(make_adapter):
    adapter = make_adapter(head=False)
    assert svd([adapter] * 5, [0.1, 0.2, 0.3, 0.3, 0.1], energy=1.0)[A].shape[0] == 4


def test_products_that_cancel_give_a_zero_of_rank_1(make_adapter):
    adapter = make_adapter(head=False)
    merged = svd([adapter, adapter], [1.0, -1.0], energy=0.9)
    assert merged[A].shape[0] == 1
    assert not merged[f"{LAYER}.lora_B.weight"].any()


def test_the_result_has_orthonormal_rows_and_scaling_1(adapters):
    merged = svd(adapters, [0.3, 0.7])
    assert_close(merged[A] @ merged[A].T, torch.eye(3, dtype=torch.float64))
    assert merged[f"{LAYER}.scaling"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank must be >= 1"), ({"energy": 0.0}, "energy must be > 0 and <= 1")],
)
def test_options_out_of_range_are_refused(adapters, options, message):
    with pytest.raises(BadOptions, match=message):
        MERGES.get("svd").build(adapters, [0.3, 0.7], **options)
