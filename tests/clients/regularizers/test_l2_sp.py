"""L2-SP's term, by hand, and from which point it measures."""

from __future__ import annotations

import torch
from torch import nn

from clients.regularizers import Beginning
from clients.regularizers.l2_sp import L2SP
from clients.regularizers.proximal import Proximal

START = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]]), "a.scaling": torch.tensor(2.0)}
BROADCAST = {"a": torch.tensor([5.0, 5.0]), "b": torch.tensor([[5.0]])}


def params():
    return {
        "a": nn.Parameter(torch.tensor([2.0, 0.0])),
        "b": nn.Parameter(torch.tensor([[3.0]])),
    }


def test_the_penalty_is_half_the_weight_times_the_squared_distance_to_the_start():
    method = L2SP(weight=0.5)
    memory = method.begin(Beginning(START), {})
    assert method.penalty(params(), BROADCAST, memory) == 0.25 * (1 + 4 + 9)


def test_the_gradient_is_the_weight_times_the_distance():
    method, theta = L2SP(weight=0.5), params()
    method.penalty(theta, BROADCAST, method.begin(Beginning(START), {})).backward()
    assert theta["a"].grad.tolist() == [0.5, -1.0]
    assert theta["b"].grad.tolist() == [[1.5]]


def test_it_is_held_against_the_start_where_the_proximal_term_is_held_against_the_broadcast():
    method = L2SP(weight=1.0)
    memory = method.begin(Beginning(START), {})
    moved = [method.penalty(params(), broadcast, memory) for broadcast in (START, BROADCAST)]
    assert moved[0] == moved[1]
    assert Proximal(mu=1.0).penalty(params(), START, {}) == moved[0]
    assert Proximal(mu=1.0).penalty(params(), BROADCAST, {}) != moved[0]


def test_a_weight_of_zero_remembers_and_adds_nothing():
    method = L2SP(weight=0.0)
    assert method.begin(Beginning(START), {}) == {}
    assert method.penalty(params(), BROADCAST, {}) is None


def test_only_what_is_trained_counts():
    method = L2SP(weight=2.0)
    theta = {"a": params()["a"]}
    assert method.penalty(theta, BROADCAST, method.begin(Beginning(START), {})) == 5


def test_the_start_is_forgotten_with_the_run():
    method = L2SP()
    assert method.consolidate(START, method.begin(Beginning(START), {})) == {}
