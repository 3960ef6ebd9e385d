import re

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ClientSpec
from strategies.rolora import RoLoRA

COUNTS = [1, 2, 5]


@pytest.fixture
def play(make_adapter, make_update):
    """Play a round; return the state after it, its updates, and what was trained."""

    def one(state):
        sent = RoLoRA().broadcast(state, ClientSpec("a"))
        names = [n for n in sent.tensors if re.fullmatch(sent.trainable, n)]
        updates = [
            make_update(
                {n: make_adapter(seed, dtype=torch.float64)[n] for n in names}, str(seed), n
            )
            for seed, n in enumerate(COUNTS, 1)
        ]
        return RoLoRA().aggregate(state, updates), updates, set(names)

    return one


def test_b_is_trained_in_odd_rounds_and_a_in_even_ones(make_adapter, play):
    state = RoLoRA().init(make_adapter(dtype=torch.float64))
    factors = []
    for _ in range(3):
        state, _, names = play(state)
        factors.append({n.partition(".lora_")[2][:1] for n in names if ".lora_" in n})
        assert {"head.weight", "head.bias"} < names
    assert factors == [{"B"}, {"A"}, {"B"}]


def test_the_product_is_exact_in_every_round(make_adapter, play, products):
    state = RoLoRA().init(make_adapter(dtype=torch.float64))
    for _ in range(2):
        before = state.adapter
        state, updates, _ = play(state)
        dense = [products({**before, **u.tensors}) for u in updates]
        for layer, product in products(state.adapter).items():
            mean = sum(n * d[layer] for n, d in zip(COUNTS, dense, strict=True)) / sum(COUNTS)
            assert_close(product, mean, rtol=1e-10, atol=1e-10)


def test_the_row_space_of_a_moves_in_even_rounds_only(make_adapter, play):
    def rows(state):
        q, _ = torch.linalg.qr(state.adapter["encoder.query.lora_A.weight"].T)
        return q @ q.T

    start = RoLoRA().init(make_adapter(dtype=torch.float64))
    odd, _, _ = play(start)
    even, _, _ = play(odd)
    assert torch.equal(rows(start), rows(odd))
    assert (rows(odd) - rows(even)).norm() > 0.1


def test_a_round_without_updates_counts(make_adapter):
    state = RoLoRA().aggregate(RoLoRA().init(make_adapter()), [])
    assert "lora_A" in RoLoRA().broadcast(state, ClientSpec("a")).trainable
