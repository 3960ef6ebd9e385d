"""What every adapter promises; a new one is tested by existing."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

import peft  # noqa: F401  (what it logs when it is first imported would keep a test's models)
import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.initialisations import TRAITS, InitInputs
from clients.per_example import ENGINES, engines_of, measuring
from strategies.plugins import BadOptions
from strategies.terms import BadMerge, merge_terms


def having(capability: str, has: bool = True) -> pytest.MarkDecorator:
    """Run a test for the adapters that declare ``capability`` only, or for the others."""
    declared = {n: ADAPTERS.get(n).build().capabilities for n in ADAPTERS.names()}
    names = [name for name, true in declared.items() if (capability in true) is has]
    return pytest.mark.parametrize("adapter", names, indirect=True)


def spec_of(folder: Path, kind: str) -> ModelSpec:
    labels = ("x", "y", "z") if kind == "classification" else ()
    return ModelSpec(id=str(folder), kind=kind, labels=labels)


@pytest.fixture(scope="module")
def backbones(tiny_encoder, tiny_decoder):
    folders = {"classification": tiny_encoder, "causal-lm": tiny_decoder}
    return {kind: models.load(spec_of(path, kind)).backbone for kind, path in folders.items()}


@pytest.fixture(params=ADAPTERS.names())
def adapter(request, tiny_options):
    return ADAPTERS.get(request.param).build(**tiny_options.get(request.param, {}))


@pytest.fixture(params=["classification", "causal-lm"])
def backbone(request, adapter, backbones):
    if request.param == "classification" and "causal-only" in adapter.capabilities:
        pytest.skip("its method is for causal-lm; launch refuses it here")
    return backbones[request.param]


@pytest.fixture
def attached(adapter, backbone):
    torch.manual_seed(7)
    model = adapter.attach(backbone, {})
    adapter.initialise(model, InitInputs(model, list, list, list))
    yield model
    adapter.detach(backbone)


def run(model) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 40, 8], [6, 7, 30, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask)[0]


def shaken(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Tensors near ``tensors``, as training would leave them."""
    source = torch.Generator().manual_seed(seed)

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(".scaling") or not tensor.is_floating_point():
            return tensor
        return tensor + 0.3 * torch.randn(tensor.shape, generator=source)

    return {name: moved(name, tensor) for name, tensor in tensors.items()}


def delta(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = [name.removesuffix(".scaling") for name in tensors if name.endswith(".scaling")]
    return {
        f"{layer}.weight": tensors[f"{layer}.scaling"]
        * tensors[f"{layer}.lora_B.weight"]
        @ tensors[f"{layer}.lora_A.weight"]
        for layer in layers
    }


def test_a_fresh_adapter_changes_nothing(adapter, backbone):
    before = run(backbone)
    model = adapter.attach(backbone, {})
    adapter.initialise(model, InitInputs(model, list, list, list))
    after = run(model)
    adapter.detach(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_detaching_restores_the_base_model_bit_for_bit(adapter, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    output = run(backbone)
    model = adapter.attach(backbone, {})
    adapter.write(model, shaken(adapter.read(model)))
    restored = adapter.detach(model)
    assert restored is backbone
    after = restored.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(run(restored), output)


def test_what_is_read_and_written_gives_the_same_logits(adapter, attached):
    fresh = run(attached)
    tensors = shaken(adapter.read(attached))
    adapter.write(attached, tensors)
    logits = run(attached)
    assert not torch.allclose(logits, fresh)
    adapter.detach(attached)
    torch.manual_seed(8)
    adapter.attach(attached, {})
    adapter.write(attached, tensors)
    assert torch.equal(run(attached), logits)
    again = adapter.read(attached)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_what_is_read_is_a_float32_copy_on_the_cpu(adapter, attached):
    tensors = adapter.read(attached)
    live = adapter.parameters(attached)
    assert all(t.dtype == torch.float32 for t in tensors.values() if t.is_floating_point())
    assert all(t.device.type == "cpu" for t in tensors.values())
    for tensor in tensors.values():
        tensor.fill_(123.0)
    assert not any((parameter == 123.0).any() for parameter in live.values())


def test_an_adapter_is_attached_in_the_mode_of_its_backbone(adapter, backbone):
    modes = []
    for training in (False, True):
        model = adapter.attach(backbone.train(training), {})
        modes.append({module.training for module in model.modules() if hasattr(module, "lora_A")})
        adapter.detach(model)
    backbone.eval()
    assert modes == [{False}, {True}]


def test_names_are_those_of_the_base_model_without_prefix(adapter, backbone):
    layers = {name for name, _ in backbone.named_modules()}
    model = adapter.attach(backbone, {})
    names = adapter.read(model)
    adapter.detach(model)
    for name in names:
        assert any(name.startswith(f"{layer}.") for layer in layers if layer)
        assert "default" not in name
        assert "base_layer" not in name


def test_every_low_rank_layer_carries_its_scaling(adapter, attached):
    tensors = adapter.read(attached)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            assert tensors[name.replace(".lora_A.weight", ".scaling")].shape == ()


def test_parameters_are_the_live_ones_behind_what_is_read(adapter, attached):
    tensors, live = adapter.read(attached), adapter.parameters(attached)
    constants = {n for n, t in tensors.items() if t.ndim == 0 or not t.is_floating_point()}
    assert live.keys() == tensors.keys() - constants
    assert all(torch.equal(live[name].detach(), tensors[name]) for name in live)
    with torch.no_grad():
        for parameter in live.values():
            parameter.add_(1.0)
    again = adapter.read(attached)
    assert all(torch.equal(again[name], tensors[name] + 1.0) for name in live)


def test_writing_keeps_the_parameters_identity(adapter, attached):
    before = adapter.parameters(attached)
    adapter.write(attached, shaken(adapter.read(attached)))
    after = adapter.parameters(attached)
    assert all(after[name] is before[name] for name in before)


def test_only_the_adapter_trains_and_the_base_model_gets_no_gradient(adapter, attached):
    parameters = adapter.parameters(attached)
    live = {id(p) for name, p in parameters.items() if not re.fullmatch(adapter.frozen, name)}
    trainable = {id(p) for p in attached.parameters() if p.requires_grad}
    assert trainable == live
    ids = torch.tensor([[5, 9, 11, 40]])
    attached.train()  # with the base model's dropout off; what only trains is reached too
    attached(input_ids=ids, attention_mask=torch.ones_like(ids))[0].square().sum().backward()
    attached.eval()
    assert {id(p) for p in attached.parameters() if p.grad is not None} == live


def test_the_first_tensors_come_from_the_global_seed(adapter, backbone):
    def first(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = adapter.attach(backbone, {})
        tensors = adapter.read(model)
        adapter.detach(model)
        return tensors

    one, same, other = first(3), first(3), first(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@having("low-rank")
def test_an_underlay_and_an_adapter_add_up(adapter, backbone):
    # The one underneath covers other layers, at another rank and scaling.
    targets = "all-linear"
    below = ADAPTERS.get("rslora").build(r=3, alpha=5.0, target_modules=targets)
    frozen = shaken(below.read(below.attach(backbone, {})), seed=2)
    below.detach(backbone)

    torch.manual_seed(7)
    model = adapter.attach(backbone, frozen)
    tensors = shaken(adapter.read(model))
    adapter.write(model, tensors)
    stacked = run(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for n, p in adapter.parameters(model).items() if not re.fullmatch(adapter.frozen, n)
    }
    adapter.detach(model)

    weights = dict(backbone.named_parameters())
    original = {name: weights[name].clone() for name in delta(frozen) | delta(tensors)}
    with torch.no_grad():
        for change in (delta(frozen), delta(adapter.factored(tensors))):
            for name, value in change.items():
                weights[name].add_(value)
        summed = run(backbone)
        for name, value in original.items():
            weights[name].copy_(value)
    torch.testing.assert_close(stacked, summed, rtol=1e-4, atol=1e-4)


@having("low-rank")
def test_an_underlay_does_not_change_the_adapters_first_tensors(adapter, backbone):
    torch.manual_seed(5)
    alone = adapter.read(adapter.attach(backbone, {}))
    after_alone = torch.rand(3)
    adapter.detach(backbone)
    torch.manual_seed(5)
    stacked = adapter.read(adapter.attach(backbone, adapter.factored(shaken(alone))))
    after_stacked = torch.rand(3)
    adapter.detach(backbone)
    assert all(torch.equal(alone[name], stacked[name]) for name in alone)
    assert torch.equal(after_alone, after_stacked)


def test_attaching_many_times_leaks_nothing(adapter, backbone):
    seen = []
    for _ in range(5):
        model = adapter.attach(backbone, {})
        seen += [weakref.ref(parameter) for parameter in adapter.parameters(model).values()]
        adapter.detach(model)
    del model
    gc.collect()
    assert not any(reference() is not None for reference in seen)
    assert not hasattr(backbone, "peft_config")


@having("low-rank")
def test_a_low_rank_delta_is_the_product_of_its_tensors(adapter, attached, backbone):
    tensors = shaken(adapter.read(attached))
    adapter.write(attached, tensors)
    for name, value in delta(adapter.factored(tensors)).items():
        layer = attached.get_submodule(name.removesuffix(".weight"))
        before = layer.get_base_layer().weight.clone()
        layer.merge()
        after = layer.get_base_layer().weight.clone()
        layer.unmerge()
        layer.get_base_layer().weight.data.copy_(before)
        torch.testing.assert_close(after - before, value, rtol=1e-4, atol=1e-5)


@having("low-rank", has=False)
def test_what_is_not_a_plain_product_is_refused_by_every_merge(adapter, attached):
    with pytest.raises(BadMerge, match="adapter 0 "):
        merge_terms([adapter.read(attached)], [1.0])


@having("merge")
def test_a_mergeable_adapter_folds_into_the_base_weights(adapter, attached):
    adapter.write(attached, shaken(adapter.read(attached)))
    logits = run(attached)
    layers = [m for m in attached.modules() if hasattr(m, "unmerge")]
    saved = [layer.get_base_layer().weight.clone() for layer in layers]
    for layer in layers:
        layer.merge()
    folded = run(attached)
    for layer, weight in zip(layers, saved, strict=True):
        layer.unmerge()
        layer.get_base_layer().weight.data.copy_(weight)
    torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-4)


@having("merge", has=False)
def test_what_is_declared_unmergeable_does_not_merge(adapter, attached):
    with pytest.raises(NotImplementedError, match="does not support"):
        next(m for m in attached.modules() if hasattr(m, "unmerge")).merge()


@having("unquantised-base")
def test_a_method_for_an_unquantised_base_refuses_another(adapter, tiny_decoder):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(id=str(tiny_decoder), kind="causal-lm", quantization="int8")
    backbone = models.load(spec).backbone
    with pytest.raises(BadOptions, match="needs a base model that is not quantised, and model"):
        adapter.attach(backbone, {})
    assert not any(hasattr(module, "lora_A") for module in backbone.modules())


@having("trains-a")
def test_a_method_for_the_training_of_a_gives_it_another_gradient_than_lora_does(adapter, backbone):
    ids = torch.tensor([[5, 9, 11, 40]])
    lora = ADAPTERS.get("lora").build()
    factors = shaken(lora.read(lora.attach(backbone, {})))
    lora.detach(backbone)

    def gradients(method) -> dict[str, torch.Tensor]:
        model = method.attach(backbone, {}).train()
        method.write(model, {**method.read(model), **factors})
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        out[..., ::2].sum().backward()  # not of all: a layer norm makes that a constant
        live = method.parameters(model)
        method.detach(model).eval()
        return {n: p.grad for n, p in live.items() if n.endswith(".lora_A.weight")}

    ours, plain, again = gradients(adapter), gradients(lora), gradients(lora)
    assert ours.keys() == plain.keys()
    for name in plain:
        assert torch.equal(again[name], plain[name])
        assert not torch.allclose(ours[name], plain[name])


def declared_engines() -> list[tuple[str, str]]:
    """Every adapter with each engine that it declares, or that comes after that one."""
    built = {name: ADAPTERS.get(name).build() for name in ADAPTERS.names()}
    return [(name, e) for name, one in built.items() for e in engines_of(one.capabilities)]


@pytest.mark.parametrize(("adapter", "engine"), declared_engines(), indirect=["adapter"])
def test_the_engines_for_an_adapter_give_the_gradients_of_microbatches_of_one(
    adapter, attached, engine
):
    adapter.write(attached, shaken(adapter.read(attached)))
    parameters = adapter.parameters(attached)
    live = {n: p for n, p in parameters.items() if not re.fullmatch(adapter.frozen, n)}
    assert live
    ids = torch.tensor([[5, 11, 9, 4], [6, 11, 30, 7], [11, 40, 8, 8]])

    def losses(rows: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # what a method draws is the same for each, and a draw all the same
        out = attached(input_ids=rows, attention_mask=torch.ones_like(rows))[0]
        return out[..., ::2].square().flatten(1).sum(1)  # not of all: a layer norm makes that fixed

    try:
        with measuring(attached.train(), live, engine) as measure:
            found = measure.gradients(ids, losses, check=True)
        together = {name: samples.dense() for name, samples in found.items()}
        for index in range(len(ids)):
            alone = torch.autograd.grad(losses(ids[index : index + 1]).sum(), list(live.values()))
            for name, expected in zip(live, alone, strict=True):
                assert expected.norm() > 0, name
                error = (together[name][index] - expected).norm()
                assert error <= 1e-5 * expected.norm() + 1e-7, name
    finally:
        attached.eval()


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_says_what_it_is_and_where_it_comes_from(name):
    plugin = ADAPTERS.get(name)
    assert plugin.summary.endswith(".")
    assert plugin.source
    known = {"low-rank", "merge", "causal-only", "unquantised-base", "trains-a"} | TRAITS
    known |= {f"dp-{engine}" for engine in ENGINES}
    assert plugin.build().capabilities <= known
