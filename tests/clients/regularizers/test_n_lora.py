"""N-LoRA's penalty, by hand and against autograd on the dense product."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clients.assignment import PluginChoice
from clients.regularizers import REGULARIZERS, n_lora
from clients.trainer import train
from strategies.base import Broadcast


def penalised(**options):
    return REGULARIZERS.get("n-lora").build(**options)


@pytest.fixture
def layer():
    source = torch.Generator().manual_seed(0)
    return {
        "q.lora_A.weight": torch.randn(2, 7, generator=source),
        "q.lora_B.weight": torch.randn(5, 2, generator=source),
        "q.scaling": torch.tensor(-1.5),
    }


def trained(layer, *names):
    return {n: nn.Parameter(layer[n].clone()) for n in names or layer if n != "q.scaling"}


def test_it_is_the_sum_of_the_absolute_changes_of_small_numbers():
    layer = {
        "q.lora_A.weight": torch.tensor([[1.0, -2.0, 0.0]]),
        "q.lora_B.weight": torch.tensor([[3.0], [-1.0]]),
        "q.scaling": torch.tensor(2.0),
    }
    # B A = [[3, -6, 0], [-1, 2, 0]]
    assert penalised(weight=0.5).penalty(trained(layer), layer, {}) == 0.5 * 2 * 12
    mean = penalised(weight=0.5, reduction="mean").penalty(trained(layer), layer, {})
    assert mean == 0.5 * 2 * 12 / 6


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_its_gradient_is_that_of_the_dense_product_however_it_is_blocked(monkeypatch, layer, rows):
    monkeypatch.setattr(n_lora, "_ENTRIES", 7 * rows)
    params, dense = trained(layer), trained(layer)
    penalised(weight=0.1).penalty(params, layer, {}).backward()
    product = layer["q.scaling"] * dense["q.lora_B.weight"] @ dense["q.lora_A.weight"]
    (0.1 * product.abs().sum()).backward()
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.grad, dense[name].grad)


def test_a_fresh_b_is_not_moved(layer):
    fresh = {**layer, "q.lora_B.weight": torch.zeros(5, 2)}
    params = trained(fresh)
    penalised().penalty(params, fresh, {}).backward()
    assert not any(parameter.grad.any() for parameter in params.values())


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_B.weight"])
def test_of_a_product_with_a_frozen_factor_the_other_is_penalised(layer, name):
    params = trained(layer, name)
    value = penalised(weight=1.0).penalty(params, layer, {})
    torch.testing.assert_close(value, penalised(weight=1.0).penalty(trained(layer), layer, {}))
    value.backward()
    assert params[name].grad.any()


def test_a_diagonal_between_the_factors_is_part_of_the_change(layer):
    diagonal = torch.tensor([2.0, 0.0])
    whole = {**layer, "q.lora_diag": diagonal}
    folded = {**layer, "q.lora_B.weight": layer["q.lora_B.weight"] * diagonal}
    found = penalised().penalty(trained(whole), whole, {})
    torch.testing.assert_close(found, penalised().penalty(trained(folded), folded, {}))


@pytest.mark.parametrize("trainable", [".*", r".*\.lora_B\..*|head\..*"])
def test_in_a_round_it_makes_the_change_smaller_whichever_factor_is_trained(assign, trainable):
    task = assign(optimizer=PluginChoice("adamw", {"lr": 0.01}))
    changes = []
    for weight in (0.0, 0.01):
        choice = PluginChoice("n-lora", {"weight": weight})
        broadcast = Broadcast(task.broadcast.tensors, trainable)
        asked = replace(task, regularizers=(choice,), broadcast=broadcast, steps=20)
        tensors = {**task.broadcast.tensors, **train(asked).tensors}
        products = [
            (tensors[n.replace("_A.", "_B.")] @ tensors[n]).abs().sum()
            for n in tensors
            if n.endswith("lora_A.weight")
        ]
        changes.append(float(torch.stack(products).sum()))
    assert changes[1] < 0.7 * changes[0]
