"""MiCA: B is the minor subspace of the base weight, and stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from clients.initialisations import InitInputs
from clients.session import returned_names
from clients.starting import initial_tensors
from clients.trainer import train

QUERY = "encoder.layer.0.attention.self.query"


class OneLayer(nn.Module):
    """A base model of one linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def initialised(backbone: nn.Module, **options) -> dict[str, torch.Tensor]:
    adapter = ADAPTERS.get("mica").build(**options)
    model = adapter.attach(backbone, {})
    adapter.initialise(model, InitInputs(model, list, list, list))
    tensors = adapter.read(model)
    adapter.detach(model)
    return tensors


def diagonal(*values: float) -> OneLayer:
    layer = nn.Linear(len(values), len(values), bias=False)
    layer.weight.data = torch.diag(torch.tensor(values))
    return OneLayer(layer)


def test_b_spans_the_directions_of_the_smallest_singular_values():
    # singular values 5, 0.2, 3, 0.1: the two smallest belong to the axes 1 and 3
    b = initialised(diagonal(5.0, 0.2, 3.0, 0.1), r=2, target_modules=["layer"])
    b = b["layer.lora_B.weight"]
    torch.testing.assert_close(b @ b.T, torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0])))


def test_the_columns_of_b_are_orthonormal_and_a_is_zero(tiny_encoder):
    base = models.load(ModelSpec(str(tiny_encoder), "classification", labels=("x", "y")))
    tensors = initialised(base.backbone, r=6)
    b = tensors[f"{QUERY}.lora_B.weight"]
    torch.testing.assert_close(b.T @ b, torch.eye(6), atol=1e-5, rtol=0)
    assert not tensors[f"{QUERY}.lora_A.weight"].any()
    weight = base.backbone.get_submodule(QUERY).weight.detach()
    smallest = torch.linalg.svdvals(weight)[-6:]
    torch.testing.assert_close((weight.T @ b).norm(dim=0), smallest, atol=1e-5, rtol=1e-4)


def test_b_is_orthonormal_whatever_the_precision_of_the_base_model(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("x", "y"), compute_dtype="bf16")
    b = initialised(models.load(spec).backbone, r=4)[f"{QUERY}.lora_B.weight"]
    torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)


def test_a_transposed_weight_is_decomposed_as_it_acts():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 3)  # [in, out]: 3 inputs, 6 outputs
    b = initialised(OneLayer(layer), r=2, target_modules=["layer"])["layer.lora_B.weight"]
    left = torch.linalg.svd(layer.weight.T, full_matrices=False).U[:, -2:]
    torch.testing.assert_close(b @ b.T, left @ left.T)


def test_a_quantised_weight_is_decomposed_as_it_acts(tiny_decoder):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(str(tiny_decoder), "causal-lm", quantization="int8")
    backbone = models.load(spec).backbone
    ids = torch.tensor([[5, 9, 11]])
    layer = "model.layers.0.self_attn.q_proj"
    found = []
    for _ in range(2):  # bitsandbytes keeps its scales elsewhere after a first forward pass
        found.append(initialised(backbone, r=4)[f"{layer}.lora_B.weight"])
        backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(found[0] @ found[0].T, found[1] @ found[1].T, atol=1e-3, rtol=0)
    whole = models.load(replace(spec, quantization="none")).backbone
    b = initialised(whole, r=4)[f"{layer}.lora_B.weight"]
    overlap = torch.linalg.svdvals(b.T @ found[0])
    assert overlap.min() > 0.9  # the same subspace, but for the rounding of the weights


def test_the_first_tensors_are_those_of_pefts_own_mica(tiny_encoder):
    from peft import LoraConfig, LoraModel

    backbone = models.load(ModelSpec(str(tiny_encoder), "classification", labels=("x", "y")))
    ours = initialised(backbone.backbone, r=4)[f"{QUERY}.lora_B.weight"]
    backbone = backbone.backbone
    config = LoraConfig(r=4, target_modules=["query"], init_lora_weights="mica")
    LoraModel(backbone, config, "default")
    layer = backbone.get_submodule(QUERY)
    theirs = layer.lora_B["default"].weight.detach().clone()
    ADAPTERS.get("mica").build().detach(backbone)
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, atol=1e-5, rtol=0)


def test_an_attachment_that_is_written_to_decomposes_nothing(tiny_encoder, monkeypatch):
    base = models.load(ModelSpec(str(tiny_encoder), "classification", labels=("x", "y")))
    tensors = initialised(base.backbone, r=4)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a singular value decomposition")

    monkeypatch.setattr(torch.linalg, "svd", never)
    adapter = ADAPTERS.get("mica").build(r=4)
    model = adapter.attach(base.backbone, {})
    adapter.write(model, tensors)
    again = adapter.read(model)
    adapter.detach(model)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.fixture
def mica(assign):
    """Return an assignment that trains MiCA, all that its broadcast asks for."""
    return assign(adapter=PluginChoice("mica", {"r": 2, "layers": [0]}))


def test_a_client_trains_a_and_the_head_and_returns_no_b(mica):
    update = train(mica)
    assert returned_names(mica) == sorted(update.tensors)
    assert not any("lora_B" in name for name in update.tensors)
    name = f"{QUERY}.lora_A.weight"
    assert update.tensors[name].abs().max() > 0
    assert mica.broadcast.tensors[name].abs().max() == 0


def test_the_initial_tensors_hold_the_decomposition(mica):
    tensors = initial_tensors(replace(mica, action="init", seed=99))
    name = f"{QUERY}.lora_B.weight"
    assert torch.equal(tensors[name], mica.broadcast.tensors[name])  # no seed in it
    torch.testing.assert_close(tensors[name].T @ tensors[name], torch.eye(2))
