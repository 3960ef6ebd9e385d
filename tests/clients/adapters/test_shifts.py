"""Whole parameters that train beside the factors: biases and PEFT's ``modules_to_save``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clients import models, shifts
from clients.adapters import ADAPTERS
from clients.adapters.peft import UnsupportedUnderlay
from clients.assignment import ModelSpec
from clients.lora_layers import AdapterMismatch
from clients.per_example import engines_of
from clients.verification import chosen
from strategies.plugins import BadOptions
from strategies.terms import BadMerge, merge_terms

WHOLE = {"r": 2, "bias": "all", "modules_to_save": ["embeddings.LayerNorm"]}
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def backbone(tiny_encoder):
    spec = ModelSpec(id=str(tiny_encoder), kind="classification", labels=("x", "y"))
    return models.load(spec).backbone


@pytest.fixture(params=["lora", "dora"])
def adapter(request):
    return ADAPTERS.get(request.param).build(**WHOLE)


@pytest.fixture
def attached(adapter, backbone):
    torch.manual_seed(0)
    yield adapter.attach(backbone, {})
    adapter.detach(backbone)


def run(model) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 40, 8]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def shaken(tensors):
    source = torch.Generator().manual_seed(1)
    return {
        n: t if n.endswith(".scaling") else t + 0.3 * torch.randn(t.shape, generator=source)
        for n, t in tensors.items()
    }


def changed(model, adapter):
    tensors = shaken(adapter.read(model))
    adapter.write(model, tensors)
    return tensors


def test_a_fresh_one_changes_nothing_and_one_that_is_taken_out_leaves_no_trace(adapter, backbone):
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    kinds, before = [type(m) for m in backbone.modules()], run(backbone)
    objects = {name: id(p) for name, p in backbone.named_parameters()}
    model = adapter.attach(backbone, {})
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    changed(model, adapter)
    assert not torch.allclose(run(model), before, atol=1e-2)
    adapter.detach(model)
    assert [type(m) for m in backbone.modules()] == kinds
    assert {name: id(p) for name, p in backbone.named_parameters()} == objects
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items())
    assert torch.equal(run(backbone), before)


def test_it_computes_what_the_base_with_the_changes_in_it_computes(attached, adapter, backbone):
    tensors = changed(attached, adapter)
    logits = run(attached)
    adapter.detach(backbone)
    plain = ADAPTERS.get("dora" if "magnitude" in str(tensors.keys()) else "lora").build(r=2)
    factors, changes = shifts.split(tensors)
    own = dict(backbone.named_parameters())
    before = {name: own[name].clone() for name in shifts.sums(backbone, changes)}
    with torch.no_grad():
        for name, value in shifts.sums(backbone, changes).items():
            own[name].copy_(value)
    plain.attach(backbone, {})
    plain.write(backbone, factors)
    summed = run(backbone)
    plain.detach(backbone)
    with torch.no_grad():
        for name, value in before.items():
            own[name].copy_(value)
    torch.testing.assert_close(summed, logits, rtol=0, atol=1e-6)


def test_every_bias_and_every_parameter_of_a_named_module_is_in_it(attached, adapter, backbone):
    names = set(shifts.split(adapter.read(attached))[1])
    adapter.detach(backbone)
    biases = {n for n, _ in backbone.named_parameters() if n.endswith(".bias")}
    expected = biases | {"embeddings.LayerNorm.weight"}
    assert names == {f"{n.rpartition('.')[0]}.shift.{n.rpartition('.')[2]}" for n in expected}


def test_only_what_is_the_adapters_trains(attached, adapter):
    live = adapter.parameters(attached)
    assert {id(p) for p in attached.parameters() if p.requires_grad} == set(map(id, live.values()))
    ids = torch.tensor([[5, 9, 11, 40]])
    attached(input_ids=ids).last_hidden_state[..., ::2].square().sum().backward()
    grads = {name: p.grad for name, p in live.items()}
    assert all(grads[n] is not None for n in grads if "pooler" not in n)
    assert float(grads["embeddings.LayerNorm.shift.weight"].norm()) > 0
    assert float(grads[f"{QUERY}.shift.bias"].norm()) > 0


def test_what_does_not_fit_is_refused_and_nothing_is_written(attached, adapter):
    tensors = adapter.read(attached)
    before = run(attached)
    short = {n: t for n, t in tensors.items() if n != f"{QUERY}.shift.bias"}
    wide = {**tensors, f"{QUERY}.shift.bias": torch.ones(3)}
    odd = {**tensors, f"{QUERY}.shift.other": torch.ones(3)}
    for given, what in ((short, "has no tensor"), (wide, "must be"), (odd, "has the tensor")):
        with pytest.raises(AdapterMismatch, match=rf"{what}|{QUERY}"):
            adapter.write(attached, shaken(given))
        assert torch.equal(run(attached), before)


def test_no_product_is_no_product(attached, adapter):
    assert "low-rank" not in adapter.capabilities
    with pytest.raises(BadMerge, match="adapter 0"):
        merge_terms([adapter.read(attached)], [1.0])


def test_it_is_not_trained_on_top_of_another(backbone, adapter):
    below = ADAPTERS.get("lora").build(r=2)
    frozen = below.read(below.attach(backbone, {}))
    below.detach(backbone)
    with pytest.raises(UnsupportedUnderlay, match="not a product"):
        adapter.attach(backbone, frozen)
    assert not any("parametrizations" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["layernorm"]}, "no module of the base model is called 'layernorm'"),
        ({"modules_to_save": ["self"]}, "has low-rank factors already"),
        ({"bias": "some"}, "none"),
        ({"bias": "all", "init": "pissa"}, "without bias"),
    ],
)
def test_options_that_do_not_fit_are_refused(backbone, options, message):
    with pytest.raises(BadOptions, match=message):
        ADAPTERS.get("lora").build(**options).attach(backbone, {})


def test_a_model_without_biases_is_refused(tiny_decoder):
    backbone = models.load(ModelSpec(id=str(tiny_decoder), kind="causal-lm")).backbone
    with pytest.raises(BadOptions, match="of this base model have none"):
        ADAPTERS.get("lora").build(bias="lora_only").attach(backbone, {})


def test_a_parameter_that_two_layers_share_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    with pytest.raises(BadOptions, match="first and second share one weight"):
        shifts.places(model, [], "none", ["second"])


def test_each_example_has_its_own_gradient_of_every_change(attached, adapter):
    changed(attached, adapter)
    live = adapter.parameters(attached)
    ids = torch.tensor([[5, 9, 11, 40], [6, 7, 30, 8]])

    def losses(rows: torch.Tensor) -> torch.Tensor:
        out = attached(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state
        return out[..., ::2].square().flatten(1).sum(1)

    try:
        engines = engines_of(adapter.capabilities)
        assert chosen(attached.train(), live, engines, ids, losses) == "vmap"
    finally:
        attached.eval()
