"""What every optimizer keeps to; a new one is tested by existing."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from clients.optimizers import OPTIMIZERS
from clients.optimizers.descent import PlainDescent
from strategies.plugins import BadOptions

EVERY = pytest.mark.parametrize("name", OPTIMIZERS.names())


def build(name, seed=0, **options):
    """Return a low-rank pair, the optimizer of it, and a quadratic to descend."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        "layer.lora_A.weight": nn.Parameter(torch.randn(2, 6, generator=generator)),
        "layer.lora_B.weight": nn.Parameter(torch.randn(4, 2, generator=generator)),
    }
    return params, OPTIMIZERS.get(name).build(list(params.values()), **options)


def loss(params):
    return sum(p.square().sum() for p in params.values()) / 2


def train(params, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()


def test_adamw_and_sgd_are_there():
    assert {"adamw", "sgd"} <= set(OPTIMIZERS.names())


@EVERY
def test_it_descends_a_quadratic_at_its_defaults(name):
    params, optimizer = build(name)
    before = loss(params).item()
    train(params, optimizer, 100)
    assert loss(params).item() < 0.95 * before


@EVERY
def test_its_state_survives_saving(name):
    params, optimizer = build(name)
    train(params, optimizer, 5)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), {k: p.detach() for k, p in params.items()}], file)
    file.seek(0)
    state, tensors = torch.load(file)
    other_params, other = build(name, seed=1)
    other.load_state_dict(state)
    for key, tensor in tensors.items():
        other_params[key].data.copy_(tensor)
    train(params, optimizer, 5)
    train(other_params, other, 5)
    assert all(torch.equal(params[key], other_params[key]) for key in params)


@EVERY
def test_a_parameter_without_a_gradient_stays(name):
    params, optimizer = build(name)
    before = params["layer.lora_A.weight"].detach().clone()
    params["layer.lora_B.weight"].square().sum().backward()
    optimizer.step()
    assert torch.equal(params["layer.lora_A.weight"], before)


@EVERY
def test_it_says_what_it_is_and_takes_a_learning_rate(name):
    plugin = OPTIMIZERS.get(name)
    assert plugin.summary.endswith(".")
    assert "lr" in plugin.options
    assert not any(option.required for option in plugin.options.values())
    with pytest.raises(BadOptions, match="lr must be"):
        plugin.check({"lr": 0.0})


@EVERY
def test_plain_descent_moves_by_the_learning_rate_times_the_sum_of_gradients(name):
    params, optimizer = build(name, lr=0.125)
    before = {key: p.detach().clone() for key, p in params.items()}
    sums = {key: torch.zeros_like(p) for key, p in before.items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for key, p in params.items():
            p.grad = torch.randn(p.shape, generator=generator)
            sums[key] += p.grad
        optimizer.step()
    plain = all(
        torch.allclose(params[k], before[k] - 0.125 * g, atol=1e-6) for k, g in sums.items()
    )
    assert plain is isinstance(optimizer, PlainDescent)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.5}, {"weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True}]
)
def test_sgd_with_more_than_the_gradient_is_no_plain_descent(options):
    assert not isinstance(build("sgd", **options)[1], PlainDescent)


def test_sgd_takes_the_step_one_can_check_by_hand():
    params, optimizer = build("sgd", lr=0.25)
    before = {key: p.detach().clone() for key, p in params.items()}
    train(params, optimizer, 1)
    assert all(torch.allclose(params[key], 0.75 * before[key]) for key in params)


def test_adamw_moves_by_the_learning_rate_at_first():
    params, optimizer = build("adamw", lr=0.01)
    before = {key: p.detach().clone() for key, p in params.items()}
    train(params, optimizer, 1)
    for key, p in params.items():
        assert torch.allclose(p, before[key] - 0.01 * before[key].sign(), atol=1e-6)


def test_adamw_does_not_decay_unless_asked():
    params, optimizer = build("adamw")
    for p in params.values():
        p.grad = torch.zeros_like(p)
    before = {key: p.detach().clone() for key, p in params.items()}
    optimizer.step()
    assert all(torch.equal(params[key], before[key]) for key in params)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(BadOptions, match="nesterov needs momentum > 0"):
        build("sgd", nesterov=True)


@pytest.mark.parametrize(
    "options", [{"beta1": 1.0}, {"eps": 0.0}, {"weight_decay": -0.1}, {"lr": -1.0}]
)
def test_adamw_refuses_options_out_of_range(options):
    with pytest.raises(BadOptions, match=f"{next(iter(options))} must be"):
        build("adamw", **options)
