"""KaSA's penalties, by hand and against PEFT's own."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn

from clients.regularizers import REGULARIZERS


def kasa(**options):
    return REGULARIZERS.get("kasa").build(**options)


def test_an_orthonormal_adapter_without_a_diagonal_costs_nothing():
    params = {
        "q.lora_A.weight": torch.eye(2, 5),
        "q.lora_B.weight": torch.eye(6, 2),
        "q.lora_diag": torch.zeros(2),
    }

    assert kasa(gamma=3.0, beta=2.0).penalty(params, {}, {}) == 0


def test_the_penalties_are_the_papers_of_small_numbers():
    params = {
        "q.lora_A.weight": torch.eye(2, 5),
        "q.lora_B.weight": torch.zeros(6, 2),  # B^T B - I = -I, whose norm is the root of 2
        "q.lora_diag": torch.tensor([1.0, -2.0]),
    }

    found = kasa(beta=0.5, gamma=0.1).penalty(params, {}, {})

    assert float(found) == pytest.approx(0.5 * 5 + 0.1 * math.sqrt(2))


def test_only_what_is_trained_is_penalised():
    assert kasa().penalty({"q.lora_A.weight": torch.ones(2, 5)}, {}, {}) is None
    found = kasa(beta=1.0).penalty({"q.lora_diag": torch.ones(3)}, {}, {})
    assert float(found) == 3.0


def test_the_penalty_is_pefts_own():
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["0", "1"], kasa_config=KasaConfig(beta=0.3, gamma=0.7))
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), config)
    params = {}
    for layer in ("0", "1"):
        module = model.base_model.model[int(layer)]
        module.lora_B["default"].weight.data.normal_()
        params[f"{layer}.lora_A.weight"] = module.lora_A["default"].weight
        params[f"{layer}.lora_B.weight"] = module.lora_B["default"].weight
        params[f"{layer}.lora_diag"] = module.lora_diag["default"]

    found = kasa(beta=0.3, gamma=0.7).penalty(params, {}, {})

    torch.testing.assert_close(found, model.base_model._get_kasa_loss())
