"""A model with an adapter in its weights computes what base model and adapter compute."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from clients import into_base, models
from clients.adapters import ADAPTERS
from clients.agreement import MergeIsOff
from clients.assignment import ModelSpec, PluginChoice
from clients.folders import whole_folder
from clients.into_base import IntoBase, NotMergeable, Trained, merge_into_base, write_weights
from clients.tokens import Batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.tensor([[2, 9, 11, 40, 3], [2, 7, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LABELS = ("bad", "good", "so-so")


@pytest.fixture
def decoder(tiny_decoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_decoder), kind="causal-lm")


@pytest.fixture
def encoder(tiny_encoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_encoder), kind="classification", labels=LABELS)


@pytest.fixture
def transposed(tiny_decoder, tmp_path) -> ModelSpec:
    """A GPT-2, whose weights are ``[in, out]``; its output shares the embeddings' weight."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_decoder).save_pretrained(tmp_path / "gpt2")
    return ModelSpec(id=str(tmp_path / "gpt2"), kind="causal-lm")


def trained(spec: ModelSpec, name="lora", scale=0.3, **options) -> tuple[Trained, torch.Tensor]:
    """Return an adapter as training leaves it, and what it computes of a padded batch."""
    base = models.load(spec)
    adapter = ADAPTERS.get(name).build(**options)
    torch.manual_seed(3)
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec).eval()
    with torch.no_grad():
        live = {**adapter.parameters(model.backbone), **model.head_parameters()}
        for parameter in live.values():
            parameter.add_(scale * torch.randn(parameter.shape))
        logits = model(Batch(TOKENS, MASK, torch.zeros(2).long()))
    own = adapter.read(model.backbone)
    low_rank = "low-rank" in adapter.capabilities
    tensors = {**(adapter.factored(own) if low_rank else own), **model.head_tensors()}
    adapter.detach(model.backbone)
    layers = sorted({n.removesuffix(".scaling") for n in own if n.endswith(".scaling")})
    choice = PluginChoice("lora", {"r": 1, "target_modules": layers})
    return Trained(spec, choice if low_rank else PluginChoice(name, options), tensors), logits


def merged(folder, given: Trained, dtype="fp32", **wanted):
    with whole_folder(folder) as made:
        return merge_into_base(made, given, IntoBase(dtype, **wanted), "A model.", {"version": "v"})


@torch.no_grad()
def causal_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(input_ids=TOKENS, attention_mask=MASK).logits


ALL = {"r": 2, "target_modules": "all-linear"}
CASES = {
    "lora": ("lora", {**ALL, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9.0}}),
    "rslora": ("rslora", {"r": 4, "alpha": 7.0}),
    "trained biases and modules": ("lora", {"r": 2, "modules_to_save": ["embed_tokens", "k_proj"]}),
    "dora": ("dora", {**ALL, "modules_to_save": ["input_layernorm"]}),
    "curlora": ("curlora", {"r": 2}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_merged_decoder_gives_the_logits_of_base_model_and_adapter(decoder, tmp_path, case):
    name, options = case
    given, logits = trained(decoder, name, **options)
    facts = merged(tmp_path / "out", given)
    torch.testing.assert_close(causal_logits(tmp_path / "out"), logits, rtol=0, atol=2e-4)
    assert facts["merged"]["error"] < 1e-4 < facts["merged"]["effect"]
    # the base model that all share is as it was
    fresh = AutoModelForCausalLM.from_pretrained(decoder.id)
    shared = models.load(decoder).backbone.state_dict()
    assert all(torch.equal(shared[n], t) for n, t in fresh.state_dict().items())


def test_transposed_weights_and_shared_embeddings_are_merged_right(transposed, tmp_path):
    given, logits = trained(transposed, r=2, target_modules=["c_attn", "c_fc"])
    merged(tmp_path / "out", given)
    torch.testing.assert_close(causal_logits(tmp_path / "out"), logits, rtol=0, atol=2e-4)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_weight_that_two_layers_share_is_refused(transposed, tmp_path):
    given, _ = trained(transposed, r=2, target_modules=["lm_head"])
    with pytest.raises(NotMergeable, match=r"wte.weight and lm_head.weight are one tensor, and bo"):
        merged(tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_sums_are_rounded_once_to_bf16(decoder, tmp_path):
    given, _ = trained(decoder, r=2, target_modules=["q_proj"])
    facts = merged(tmp_path / "out", given, "bf16")
    assert 1e-4 < facts["merged"]["error"] < 0.05
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    layer = "model.layers.1.self_attn.q_proj"
    a, b, s = (given.tensors[layer + n] for n in (".lora_A.weight", ".lora_B.weight", ".scaling"))
    base = load_file(f"{decoder.id}/model.safetensors")[f"{layer}.weight"]
    assert torch.equal(written[f"{layer}.weight"], (base + (s * b) @ a).bfloat16())


def test_a_classifier_is_its_body_beside_its_head(encoder, tmp_path, monkeypatch, capsys):
    given, logits = trained(encoder, r=2)
    merged(tmp_path / "out", given)
    body = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    head = load_file(tmp_path / "out" / "head.safetensors")
    with torch.no_grad():
        hidden = body(input_ids=TOKENS, attention_mask=MASK).last_hidden_state
    mask = MASK.unsqueeze(-1)
    found = (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    assert capsys.readouterr().out.strip().strip("[]").replace("'", "").split(", ")[0] in LABELS


def test_a_tagger_is_what_transformers_loads_by_itself(encoder, tmp_path):
    spec = replace(encoder, kind="token-classification")
    given, logits = trained(spec, r=2)
    merged(tmp_path / "out", given)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_a_quantised_base_is_merged_only_where_it_may_grow(decoder, tmp_path):
    pytest.importorskip("bitsandbytes")
    spec = replace(decoder, quantization="int8")
    given, logits = trained(spec, r=2)
    with pytest.raises(NotMergeable, match=r"quantised \(int8\); say --dequantize to write one"):
        merged(tmp_path / "out", given)
    merged(tmp_path / "out", given, dequantize=True)
    found = causal_logits(tmp_path / "out")
    assert float((found - logits).norm() / logits.norm()) < 0.05


def test_what_is_no_matrix_is_refused_by_name(decoder, tmp_path):
    given, _ = trained(decoder, "alora", r=2, invocation=[11])
    with pytest.raises(NotMergeable, match=r"alora cannot be merged into the base model: it acts"):
        merged(tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_a_large_model_is_written_in_several_files(decoder, tmp_path, monkeypatch):
    given, logits = trained(decoder, r=2)
    monkeypatch.setattr(into_base.write_weights, "__defaults__", (40_000,))
    merged(tmp_path / "out", given)
    files = sorted(tmp_path.glob("out/model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) == len(set(index["weight_map"].values())) > 2
    torch.testing.assert_close(causal_logits(tmp_path / "out"), logits, rtol=0, atol=2e-4)


def test_no_more_than_one_file_s_tensors_are_made_before_they_are_written(tmp_path):
    made = []

    def make(name):
        made.append((name, len(list(tmp_path.glob("*.safetensors")))))
        return torch.ones(10)

    named = {name: (10, lambda name=name: make(name)) for name in "abcd"}
    write_weights(tmp_path, named, torch.float32, limit=80)
    assert made == [("a", 0), ("b", 0), ("c", 1), ("d", 1)]


def test_a_model_that_computes_something_else_is_not_left(decoder, tmp_path, monkeypatch):
    given, _ = trained(decoder, r=2)
    right = into_base.write_weights

    def wrong(folder, tensors, dtype):
        last = "model.layers.1.mlp.down_proj.weight"
        count, make = tensors[last]
        right(folder, {**tensors, last: (count, lambda: 1.01 * make())}, dtype)

    monkeypatch.setattr(into_base, "write_weights", wrong)
    with pytest.raises(MergeIsOff, match=r"the logits of the merged model differ by 0\.0"):
        merged(tmp_path / "out", given)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_rounding_drowns_is_refused(decoder, tmp_path):
    given, _ = trained(decoder, r=2, scale=1e-2)
    with pytest.raises(MergeIsOff, match=r"all that the adapter does by .*; write it with --dtype"):
        merged(tmp_path / "out", given, "bf16")
    assert merged(tmp_path / "out", given)["merged"]["error"] < 1e-4
