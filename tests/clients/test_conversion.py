"""Every adapter is LoRA to the last bit of float32 at full rank, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from clients import conversion, models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from clients.conversion import NotConvertible, convert, convert_kept, cut
from clients.export import peft_files
from clients.models import BaseMismatch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

IDS = torch.tensor([[2, 9, 11, 40, 3], [2, 7, 3, 5, 8]])
WHOLE = 10**6  # a rank that no layer has
MADE = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
GIVEN = "it changes what the model is given, and no weight"
REFUSED = {
    "ADAPTION_PROMPT": "it changes how attention is computed, and no weight",
    "BEFT": r"it changes the bias of model\.layers\.0\.self_attn\.q_proj",
    "CARTRIDGE": GIVEN,
    "CPT": GIVEN,
    "LILY": "is not a linear function of the layer's input",
    "LN_TUNING": r"it changes model\.layers\.0\.input_layernorm, a LlamaRMSNorm, and no linear",
    "MULTITASK_PROMPT_TUNING": GIVEN,
    "POLY": "it routes between adapters by the task",
    "PREFIX_TUNING": GIVEN,
    "PROMPT_TUNING": GIVEN,
    "P_TUNING": GIVEN,
    "SHADOW": "it is a network beside the base model",
    "TRAINABLE_TOKENS": "a Embedding, and no linear layer",
    "XLORA": "it routes between other adapters",
}
UNMADE = {  # refused by their config alone: no tensor of theirs is looked at
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": [1],
        "cpt_mask": [1],
        "cpt_tokens_type_mask": [1],
    },
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 1},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3},
    "ADAPTION_PROMPT": {},
    "POLY": {},
    "SHADOW": {},
    "XLORA": {},
}
METHODS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.fixture
def decoder(tiny_decoder) -> ModelSpec:
    spec = ModelSpec(id=str(tiny_decoder), kind="causal-lm")
    return replace(spec, hash=models.base_hash(spec))


@pytest.fixture
def made(tiny_decoder, tmp_path):
    """Make an adapter with plain peft, and return its config, its tensors and its logits."""
    backbone = AutoModelForCausalLM.from_pretrained(tiny_decoder)

    def make(method, **options):
        kind = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value == method)
        if "target_modules" in {field.name for field in dataclasses.fields(kind)}:
            options = {"target_modules": ["q_proj", "down_proj"], **options}
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of each method its own
            config = kind(task_type="CAUSAL_LM", **options)
            model = peft.get_peft_model(copy.deepcopy(backbone), config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
                logits = model(input_ids=IDS).logits
            model.save_pretrained(tmp_path / "peft")
        saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        kept = {k: v for k, v in saved.items() if k not in ("base_model_name_or_path", "revision")}
        return kept, load_file(tmp_path / "peft" / "adapter_model.safetensors"), logits, model

    return make


def logits_of(converted, spec) -> torch.Tensor:
    """Return what plain peft computes with the LoRA that was made."""
    tensors, config = peft_files(converted.tensors, spec)
    kind = AutoModelForCausalLM if spec.kind == "causal-lm" else AutoModel
    base = kind.from_pretrained(spec.id)
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    peft.set_peft_model_state_dict(model, tensors)
    with torch.no_grad():
        output = model(input_ids=IDS)
    return output.logits if spec.kind == "causal-lm" else output.last_hidden_state


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_peft_is_the_same_function_as_lora_or_is_refused(method, decoder, made):
    if method == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs it")
    if method in UNMADE:
        with pytest.raises(NotConvertible, match=REFUSED[method]):
            convert_kept(decoder, {"peft_type": method, **UNMADE[method]}, {}, WHOLE)
        return
    config, tensors, logits, _ = made(method, **MADE.get(method, {}))
    if method in REFUSED:
        with pytest.raises(NotConvertible, match=f"^{method.lower()} cannot .*{REFUSED[method]}"):
            convert_kept(decoder, config, tensors, WHOLE)
        return
    converted = convert_kept(decoder, config, tensors, WHOLE)
    assert converted.energy == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(logits_of(converted, decoder), logits, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "causal-lm") for n in ADAPTERS.names()), ("dora", "classification")]
)
def test_every_method_of_weft_is_the_same_function_as_lora_or_is_refused(
    name, kind, tiny_encoder, tiny_decoder, tiny_options
):
    folder = tiny_encoder if kind == "classification" else tiny_decoder
    labels = ("a", "b") if kind == "classification" else ()
    spec = ModelSpec(id=str(folder), kind=kind, labels=labels)
    options = {"r": 4, **tiny_options.get(name, {})}
    base = models.unshared(spec)
    adapter = ADAPTERS.get(name).build(**options)
    torch.manual_seed(5)
    model = adapter.attach(base, {}).eval()
    with torch.no_grad():
        for parameter in adapter.parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        output = model(input_ids=IDS)
    tensors = adapter.read(model)
    if name == "alora":
        with pytest.raises(NotConvertible, match=r"alora cannot .* from its invocation tokens on"):
            convert(spec, PluginChoice(name, options), tensors, WHOLE)
        return
    if "low-rank" in adapter.capabilities:
        converted = cut(name, adapter.factored(tensors))
    else:
        converted = convert(spec, PluginChoice(name, options), tensors, WHOLE)
    expected = output.logits if kind == "causal-lm" else output.last_hidden_state
    assert converted.energy == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(logits_of(converted, spec), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["VERA", "LOHA", "MISS"])
def test_where_peft_converts_too_the_products_are_the_same(method, decoder, made):
    config, tensors, _, model = made(method, **MADE.get(method, {}))
    ours = convert_kept(decoder, config, tensors, 3).tensors
    theirs = peft.convert_to_lora(model, rank=4 if method == "MISS" else 3)[1]
    for layer in (name.removesuffix(".scaling") for name in ours if name.endswith(".scaling")):
        a, b = (ours[f"{layer}.lora_{side}.weight"] for side in "AB")
        p, q = (theirs[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        if method == "MISS":  # exact at its own rank, which PEFT keeps whatever is asked for
            u, s, v = torch.linalg.svd(q @ p)
            torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ v[:3], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(b @ a, q @ p, rtol=0, atol=1e-5)


def test_the_energy_of_each_layer_is_what_its_product_lacks_of_the_change(decoder, made):
    config, tensors, _, model = made("LOHA")
    converted = convert_kept(decoder, config, tensors, 3)
    lost = total = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            short = name.removeprefix("base_model.model.")
            change = layer.get_delta_weight("default").detach()
            a, b = (converted.tensors[f"{short}.lora_{side}.weight"] for side in "AB")
            kept = converted.layers[short]
            lacking = float((change - b @ a).square().sum())
            assert kept.rank == len(a) == 3
            assert kept.total == pytest.approx(float(change.square().sum()), rel=1e-4)
            assert 1 - kept.energy == pytest.approx(lacking / kept.total, abs=1e-5)
            lost, total = lost + lacking, total + kept.total
    assert 0.1 < converted.energy < 0.99
    assert 1 - converted.energy == pytest.approx(lost / total, abs=1e-5)


def test_without_a_rank_the_smallest_that_keeps_99_percent_is_taken(decoder, made, monkeypatch):
    config, tensors, _, _ = made("LOHA")
    found = convert_kept(decoder, config, tensors)
    assert min(layer.energy for layer in found.layers.values()) >= 0.99
    for name, layer in found.layers.items():
        less = convert_kept(decoder, config, tensors, layer.rank - 1)
        assert less.layers[name].energy < 0.99
    monkeypatch.setattr(conversion, "LARGEST", 5)
    assert {one.rank for one in convert_kept(decoder, config, tensors).layers.values()} == {5}


def test_a_low_rank_adapter_is_cut_from_its_factors():
    torch.manual_seed(0)
    b, a = torch.randn(6, 4), torch.randn(4, 5)
    adapter = {
        "q.lora_A.weight": a,
        "q.lora_B.weight": b,
        "q.scaling": torch.tensor(2.0),
    }
    squares = torch.linalg.svdvals(2 * b @ a).square()
    whole, two = cut("lora", adapter), cut("lora", adapter, 2)
    made = whole.tensors["q.lora_B.weight"] @ whole.tensors["q.lora_A.weight"]
    torch.testing.assert_close(made, 2 * b @ a)
    assert (whole.layers["q"].rank, whole.energy) == (4, pytest.approx(1))
    assert two.tensors["q.lora_A.weight"].shape == (2, 5)
    assert two.energy == pytest.approx(float(squares[:2].sum() / squares.sum()))
    assert two.facts()["layers"] == {"q": {"rank": 2, "energy": two.layers["q"].energy}}


def test_an_adapter_that_changes_nothing_is_kept_whole():
    zero = {
        "q.lora_A.weight": torch.ones(2, 5),
        "q.lora_B.weight": torch.zeros(6, 2),
        "q.scaling": torch.tensor(1.0),
    }
    found = cut("lora", zero)
    assert (found.layers["q"].rank, found.energy) == (1, 1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": "all"}, "bias is 'all': it trains the base model's own biases"),
        ({"modules_to_save": ["lm_head"]}, "it trains lm_head as a whole"),
        ({"init_lora_weights": "pissa"}, "it changes the base weights of .* themselves"),
        ({"target_modules": ["embed_tokens"]}, "it changes model.embed_tokens, a Embedding"),
        ({"lora_bias": True}, "it changes the bias of "),
        ({"alora_invocation_tokens": [3]}, "it acts from its invocation tokens on"),
    ],
)
def test_what_lora_s_own_settings_train_beside_the_weights_is_refused(
    options, reason, decoder, made
):
    config, tensors, _, _ = made("LORA", **options)
    with pytest.raises(NotConvertible, match=rf"^lora cannot be exported as LoRA: {reason}"):
        convert_kept(decoder, config, tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_type": "SEQ_CLS"}, "its task type SEQ_CLS brings a head with it"),
        ({"megatron_config": {"x": 1}}, "PEFT would import"),
        ({"arrow_config": {"x": 1}}, "it routes between other adapters"),
        ({"unheard": 1}, "PEFT here does not know its setting unheard"),
        ({"rank_pattern": 3, "r": "x"}, "PEFT does not "),
        ({"target_modules": ["q_proj"]}, "its file and its config differ in "),
        ({"r": 3}, "PEFT does not load it here"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change, reason, decoder, made):
    config, tensors, _, _ = made("LORA")
    with pytest.raises(NotConvertible, match=reason):
        convert_kept(decoder, {**config, **change}, tensors)


def test_a_quantised_or_another_base_model_is_refused(decoder, made):
    config, tensors, _, _ = made("VERA")
    with pytest.raises(NotConvertible, match="depends on the nf4 weights of its base model"):
        convert_kept(replace(decoder, quantization="nf4"), config, tensors)
    with pytest.raises(BaseMismatch, match="give that one with --model"):
        convert_kept(replace(decoder, hash="0" * 64), config, tensors)


def test_converting_leaves_the_generator_alone(decoder, made):
    config, tensors, _, _ = made("VERA")
    before = torch.get_rng_state()
    first = convert_kept(decoder, config, tensors, 4).tensors
    assert torch.equal(torch.get_rng_state(), before)
    again = convert_kept(decoder, config, tensors, 4).tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
