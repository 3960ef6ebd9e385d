"""FedProx's term, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clients.regularizers import REGULARIZERS
from clients.regularizers.proximal import Proximal
from strategies.plugins import BadOptions

REFERENCE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}


def params():
    return {
        "a": nn.Parameter(torch.tensor([2.0, 0.0])),
        "b": nn.Parameter(torch.tensor([[3.0]])),
    }


def test_the_penalty_is_half_mu_times_the_squared_distance():
    assert Proximal(mu=0.5).penalty(params(), REFERENCE, {}) == 0.25 * (1 + 4 + 9)


def test_the_gradient_is_mu_times_the_distance():
    theta = params()
    Proximal(mu=0.5).penalty(theta, REFERENCE, {}).backward()
    assert theta["a"].grad.tolist() == [0.5, -1.0]
    assert theta["b"].grad.tolist() == [[1.5]]


def test_the_reference_gets_no_gradient_of_its_own_parameters():
    theta = params()
    assert Proximal().penalty(theta, {k: p.detach() for k, p in theta.items()}, {}) == 0


def test_mu_zero_is_fedavg():
    assert Proximal(mu=0.0).penalty(params(), REFERENCE, {}) is None


def test_a_large_mu_holds_the_parameters_at_the_reference():
    theta = params()
    optimizer = torch.optim.SGD(theta.values(), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        task = theta["a"].sum() + theta["b"].sum()
        (task + Proximal(mu=500.0).penalty(theta, REFERENCE, {})).backward()
        optimizer.step()
    assert all(torch.allclose(theta[k], REFERENCE[k], atol=0.01) for k in theta)


def test_only_what_is_trained_counts():
    theta = {"a": params()["a"]}
    assert Proximal(mu=2.0).penalty(theta, REFERENCE, {}) == 5


def test_a_negative_mu_is_refused():
    with pytest.raises(BadOptions, match="mu must be >= 0, got -1"):
        REGULARIZERS.get("proximal").build(mu=-1)
