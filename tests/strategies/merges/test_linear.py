import pytest
import torch
from torch.testing import assert_close

from strategies.merges.linear import linear
from strategies.tensors import refactored
from strategies.terms import BadMerge

LAYER = "encoder.query"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.fixture
def family(make_adapter):
    """Adapters of one shared A, as FFA-LoRA makes them, of different scalings."""

    def make(dtype=torch.float64):
        first = make_adapter(0, dtype=dtype, head=False)
        shared = {n: t for n, t in first.items() if ".lora_A." in n}
        others = (make_adapter(n, dtype=dtype, head=False, scaling=2.0**n) for n in (1, 2))
        return [first, *({**other, **shared} for other in others)]

    return make


def weighted(adapters, weights, products):
    return sum(w * products(x)[LAYER] for x, w in zip(adapters, weights, strict=True))


def test_the_mean_of_b_over_a_shared_a_by_hand():
    a = torch.tensor([[1.0, -1.0]])
    adapters = [
        {
            "q.lora_A.weight": a,
            "q.lora_B.weight": torch.tensor([[b]]),
            "q.scaling": torch.tensor(2.0),
        }
        for b in (0.0, 2.0, 7.0)
    ]
    merged = linear(adapters, [1 / 3] * 3)
    assert torch.equal(merged["q.lora_A.weight"], a)
    assert_close(merged["q.lora_B.weight"], torch.tensor([[6.0]]))  # 3, times the scaling
    assert merged["q.scaling"] == 1.0


def test_a_shared_a_gives_the_exact_sum_whatever_the_scalings(family, products):
    merged = linear(family(), [0.5, -1.0, 2.0])
    assert_close(products(merged)[LAYER], weighted(family(), [0.5, -1.0, 2.0], products))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotations_of_one_row_space_are_carried_over(family, products, dtype):
    """As FedSVD makes them: equal row spaces, another basis for every task."""
    adapters = [refactored(adapter) for adapter in family(dtype)]
    assert not torch.allclose(adapters[0][A], adapters[1][A], atol=0.1)
    merged = linear(adapters, [0.5, -1.0, 2.0])
    expected = weighted(adapters, [0.5, -1.0, 2.0], products)
    error = (products(merged)[LAYER] - expected).norm() / expected.norm()
    assert error <= 4 * torch.finfo(dtype).eps


def test_a_row_space_inside_that_of_another_is_carried_over_in_any_order(family, products):
    wide = family()[0]
    narrow = {n: t[:2] if ".lora_A." in n else t for n, t in family()[1].items()}
    narrow = {n: t[:, :2] if ".lora_B." in n else t for n, t in narrow.items()}
    for adapters in ([wide, narrow], [narrow, wide]):
        merged = linear(adapters, [0.5, 0.5])
        assert torch.equal(merged[A], wide[A])
        assert_close(products(merged)[LAYER], weighted(adapters, [0.5, 0.5], products))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unrelated_row_spaces_are_refused_with_the_way_out(make_adapter, dtype):
    adapters = [make_adapter(seed, dtype=dtype, head=False) for seed in range(2)]
    message = r"at 'encoder.query' \d\d% of the product of adapter 1 is outside .* svd .* cat"
    with pytest.raises(BadMerge, match=message):
        linear(adapters, [0.5, 0.5])


def test_an_adapter_that_was_never_trained_fits_any_other(make_adapter, products):
    adapter = make_adapter(0, head=False)
    zero = {
        n: torch.zeros_like(t) if ".lora_B." in n else t
        for n, t in make_adapter(1, head=False).items()
    }
    merged = linear([adapter, zero], [0.5, 0.5])
    assert_close(products(merged)[LAYER], 0.5 * products(adapter)[LAYER])


def test_a_layer_that_one_adapter_has_not_counts_as_zero_there(family, products):
    first, second, _ = family()
    second = {n: t for n, t in second.items() if not n.startswith(LAYER)}
    merged = linear([first, second], [0.5, 0.5])
    assert_close(products(merged)[LAYER], 0.5 * products(first)[LAYER])


def test_the_product_is_linear_in_the_weights(family, products):
    x, y, both = (
        products(linear(family(), w))[LAYER]
        for w in ([0.5, 2.0, 1.0], [1.0, -3.0, 0.5], [1.5, -1.0, 1.5])
    )
    assert_close(x + y, both)
