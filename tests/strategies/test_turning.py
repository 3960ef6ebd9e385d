import math

import pytest
import torch
from torch.testing import assert_close

from strategies.base import Update
from strategies.fedsvd import FedSVD
from strategies.tensors import refactored
from strategies.turning import rotated, rotations, turned

A, B = "q.lora_A.weight", "q.lora_B.weight"


@pytest.fixture
def adapter():
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(4, 96, generator=generator) * 2 - 1) / math.sqrt(96)
    return {A: a, B: torch.randn(64, 4, generator=generator), "q.scaling": torch.tensor(2.0)}


def test_rotated_is_a_sum_in_the_order_of_the_rows_each_step_rounded_by_itself():
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            total = 0.0
            for k in range(3):
                total += float(turn[i, k]) * float(a[k, j])  # Python's floats are IEEE 754's
            assert float(rotated(turn, a)[i, j]) == total


def test_the_rotation_leads_from_the_old_a_to_the_very_bits_of_the_new(adapter):
    after, turns = turned(adapter)
    assert set(turns) == {A}
    assert torch.equal(rotated(turns[A], adapter[A]), after[A])
    assert_close(after[A], refactored(adapter)[A], rtol=0, atol=1e-6)
    assert torch.equal(after[B], refactored(adapter)[B])


def test_an_a_of_lower_rank_is_refactored_without_a_rotation(adapter):
    adapter[A] = adapter[A].clone()
    adapter[A][3] = adapter[A][2]
    after, turns = turned(adapter)
    assert turns == {}
    assert torch.equal(after[A], refactored(adapter)[A])


def test_an_a_with_more_rows_than_columns_has_no_rotation(adapter):
    wide = {A: torch.randn(4, 3), B: adapter[B], "q.scaling": adapter["q.scaling"]}
    assert turned(wide)[1] == {}


def test_a_hundred_rotations_later_a_is_as_orthonormal_as_after_the_first(adapter):
    strategy, generator = FedSVD(), torch.Generator().manual_seed(2)
    state = strategy.init(adapter)
    for round_ in range(1, 101):
        b = state.adapter[B] + 0.1 * torch.randn(64, 4, generator=generator)
        after = strategy.aggregate(state, [Update("a", round_, "", {B: b}, 1)])
        turn = rotations(after.auxiliary)[A]
        assert torch.equal(rotated(turn, state.adapter[A]), after.adapter[A])
        state = after
        gram = state.adapter[A].double() @ state.adapter[A].double().T
        assert_close(gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=3e-7)


def test_a_round_that_does_not_refactor_leaves_no_rotation(adapter):
    strategy = FedSVD(every=2)
    state, found = strategy.init(adapter), []
    for round_ in range(1, 5):
        state = strategy.aggregate(state, [Update("a", round_, "", {B: adapter[B]}, 1)])
        found.append(len(rotations(state.auxiliary)))
    assert found == [0, 1, 0, 1]
