import math
import re

import pytest
import torch
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import ClientSpec
from strategies.ffa_lora import FFALoRA
from strategies.plugins import BadOptions
from strategies.tensors import NotLowRank

A, B = "encoder.query.lora_A.weight", "encoder.query.lora_B.weight"


@pytest.fixture
def adapter(make_adapter):
    return make_adapter(dtype=torch.float64)


def trained(make_adapter, make_update, strategy, state):
    """Updates of three clients that trained what the broadcast lets them."""
    regex = strategy.broadcast(state, ClientSpec("a")).trainable
    for seed, count in ((1, 1), (2, 2), (3, 5)):
        tensors = make_adapter(seed, dtype=torch.float64)
        yield make_update({n: t for n, t in tensors.items() if re.fullmatch(regex, n)}, "c", count)


def test_b_and_head_are_trained_and_a_is_not(adapter):
    regex = FFALoRA().broadcast(FFALoRA().init(adapter), ClientSpec("a")).trainable
    assert {n for n in adapter if re.fullmatch(regex, n)} == {
        "encoder.query.lora_B.weight",
        "encoder.value.lora_B.weight",
        "head.weight",
        "head.bias",
    }


def test_the_mean_of_the_products_is_the_product_of_the_mean(
    adapter, make_adapter, make_update, products
):
    strategy = FFALoRA()
    state = strategy.init(adapter)
    updates = list(trained(make_adapter, make_update, strategy, state))
    after = products(strategy.aggregate(state, updates).adapter)
    dense = [products({**state.adapter, **u.tensors}) for u in updates]
    for layer in after:
        exact = (dense[0][layer] + 2 * dense[1][layer] + 5 * dense[2][layer]) / 8
        assert_close(after[layer], exact)


def test_a_stays_the_same_bits_over_rounds(adapter, make_adapter, make_update):
    strategy = FFALoRA()
    state = strategy.init(adapter)
    for _ in range(3):
        state = strategy.aggregate(state, trained(make_adapter, make_update, strategy, state))
    assert torch.equal(state.adapter[A], adapter[A])


def test_a_stays_as_it_was_drawn_by_default(adapter):
    assert all(torch.equal(t, adapter[n]) for n, t in FFALoRA().init(adapter).adapter.items())


def test_orthonormal_keeps_the_row_space_and_a_zero_b(adapter):
    adapter[B] = torch.zeros_like(adapter[B])
    first = FFALoRA(orthonormal=True).init(adapter).adapter
    assert_close(first[A] @ first[A].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    q, _ = torch.linalg.qr(adapter[A].T)
    assert torch.linalg.svdvals(first[A] @ q).min() >= 1 - 1e-10
    assert not first[B].any()


def test_orthonormal_keeps_the_product_of_a_continued_adapter(adapter, products):
    first = FFALoRA(orthonormal=True).init(adapter).adapter
    assert_close(products(first), products(adapter))


def test_row_scale_is_the_norm_of_the_rows(adapter):
    first = FFALoRA(orthonormal=True, row_scale=1 / math.sqrt(3)).init(adapter).adapter
    assert_close(first[A] @ first[A].T, torch.eye(4, dtype=torch.float64) / 3)


def test_row_scale_without_orthonormal_is_refused():
    with pytest.raises(BadOptions, match="set orthonormal: true"):
        STRATEGIES.get("ffa-lora").build(row_scale=0.5)


def test_an_adapter_without_low_rank_layers_is_refused():
    with pytest.raises(NotLowRank):
        FFALoRA().init({"head.weight": torch.ones(2, 2)})
