"""Task arithmetic: exact sums and differences at the rank that they need."""

import pytest
from torch.testing import assert_close

from strategies.merges.task_arithmetic import task_arithmetic

LAYER = "encoder.query"
A = f"{LAYER}.lora_A.weight"


def test_what_a_sum_holds_can_be_taken_away_again(make_adapter, products):
    one, two = make_adapter(1, rank=2, head=False), make_adapter(2, rank=1, head=False)
    both = task_arithmetic([one, two], [1.0, 1.0])
    left = task_arithmetic([both, two], [1.0, -1.0])
    assert len(both[A]) == 3
    assert len(left[A]) == 2
    assert_close(products(left)[LAYER], products(one)[LAYER], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_scale_multiplies_the_sum(make_adapter, products, scale):
    adapters = [make_adapter(seed, head=False, scaling=seed) for seed in (1, 2)]
    merged = task_arithmetic(adapters, [0.5, -2.0], scale=scale)
    one, two = (products(adapter)[LAYER] for adapter in adapters)
    assert_close(products(merged)[LAYER], scale * (0.5 * one - 2 * two), rtol=1e-5, atol=1e-5)


def test_an_adapter_without_itself_is_a_zero_of_rank_1(make_adapter, products):
    adapter = make_adapter(head=False)
    merged = task_arithmetic([adapter, adapter], [1.0, -1.0])
    assert len(merged[A]) == 1
    assert products(merged)[LAYER].abs().max() < 1e-6
