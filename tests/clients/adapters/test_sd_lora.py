"""SD-LoRA: frozen directions below a trained pair."""

from __future__ import annotations

import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.lora_layers import AdapterMismatch
from strategies.directions import with_task

QUERY = "encoder.layer.0.attention.self.query"
A, B, MAGNITUDES = (
    f"{QUERY}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitudes")
)
PAST_A = f"{QUERY}.past_A.weight"


@pytest.fixture
def backbone(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("x", "y"))
    return models.load(spec).backbone


@pytest.fixture
def adapter():
    return ADAPTERS.get("sd-lora").build(r=2, layers=[0], target_modules=["query"])


@pytest.fixture
def tensors(backbone, adapter):
    """Two tasks: one that is learned, and a second that has begun to be."""
    torch.manual_seed(0)
    first = adapter.read(adapter.attach(backbone, {}))
    adapter.detach(backbone)
    second = with_task({**first, B: torch.randn(32, 2)}, seed=1)
    return {**second, B: torch.randn(32, 2), MAGNITUDES: torch.tensor([3.0, -0.5])}


def test_a_layer_computes_the_sum_over_all_tasks(backbone, adapter, tensors):
    model = adapter.attach(backbone, {})
    adapter.write(model, tensors)
    layer, x = model.get_submodule(QUERY), torch.randn(4, 32)
    with torch.no_grad():
        found = layer(x) - layer.get_base_layer()(x)
    again = adapter.read(model)
    adapter.detach(model)
    past = tensors[f"{QUERY}.past_B.weight"] @ tensors[PAST_A]
    exact = 3.0 * past - 0.5 * tensors[B] @ tensors[A]
    torch.testing.assert_close(found, x @ exact.T, rtol=1e-4, atol=1e-4)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], tensors[n]) for n in tensors)


def test_magnitudes_of_all_tasks_and_the_new_pair_train_and_nothing_else(
    backbone, adapter, tensors
):
    model = adapter.attach(backbone, {})
    adapter.write(model, tensors)
    live = adapter.parameters(model)
    assert live.keys() == {A, B, MAGNITUDES}
    ids = torch.tensor([[5, 9, 11, 40]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    out[..., ::2].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in live.items()}
    adapter.detach(model)
    assert gradients[MAGNITUDES].shape == (2,)
    assert all(gradient.ne(0).all() for gradient in gradients.values())


def test_folding_adds_the_sum_over_all_tasks_to_the_base_weight(backbone, adapter, tensors):
    model = adapter.attach(backbone, {})
    adapter.write(model, tensors)
    layer, x = model.get_submodule(QUERY), torch.randn(4, 32)
    weight = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        after = layer(x)
    layer.unmerge()
    layer.get_base_layer().weight.data.copy_(weight)
    adapter.detach(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PAST_A: None}, r"has 1 magnitudes of earlier tasks, and past_A .* \[None, \[32, 2\]\]"),
        ({PAST_A: torch.ones(3, 32)}, r"must be \[ranks, 32\] and \[32, ranks\]"),
        ({MAGNITUDES: torch.ones(4)}, "has 3 magnitudes of earlier tasks"),
        ({MAGNITUDES: None}, "has no tensor .*lora_magnitudes; it was trained by another method"),
        ({B: torch.ones(32, 5)}, r"lora_B.weight must be \[32, 2\], got \[32, 5\]"),
    ],
)
def test_directions_that_do_not_fit_are_refused_and_nothing_is_written(
    backbone, adapter, tensors, changes, message
):
    model = adapter.attach(backbone, {})
    before = adapter.read(model)
    given = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
    try:
        with pytest.raises(AdapterMismatch, match=message):
            adapter.write(model, given)
        after = adapter.read(model)
    finally:
        adapter.detach(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
