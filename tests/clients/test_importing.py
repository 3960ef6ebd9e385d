"""Imported folders compute what plain peft computes on them."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.export import export_peft
from clients.importing import NotImportable, read_peft

# PEFT 0.21's PeftModel asks transformers 5.23 for an attribute that is about to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.tensor([[2, 9, 11, 40, 3], [2, 7, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture
def saved(tiny_decoder, tmp_path):
    """Make an adapter with plain peft, save it, and return its folder and logits."""

    def make(config, auto=AutoModelForCausalLM, base=tiny_decoder, **options):
        options = {"task_type": "CAUSAL_LM", **options}
        backbone = auto.from_pretrained(
            base, **({"num_labels": 3, "pad_token_id": 0} if "Sequence" in auto.__name__ else {})
        )
        torch.manual_seed(5)
        model = get_peft_model(backbone, config(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            logits = model(input_ids=TOKENS, attention_mask=MASK)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits

    return make


def computed(found) -> torch.Tensor:
    """Return weft's own logits for what was read."""
    base = models.load(found.model)
    adapter = ADAPTERS.get(found.adapter.name).build(**found.adapter.options)
    model = models.TaskModel(adapter.attach(base.backbone, {}), found.model)
    try:
        adapter.write(model.backbone, found.tensors)
        head = {name: t for name, t in found.tensors.items() if name.startswith("head.")}
        if head:
            model.write_head(head)
        model.eval()
        with torch.no_grad():
            return model(Batch(TOKENS, MASK, torch.zeros(2).long()))
    finally:
        adapter.detach(model.backbone)


LORA = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 2, "use_dora": True},
    "ranks and alphas by layer": {
        "r": 4,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "some layers": {"r": 2, "layers_to_transform": [1]},
    "drawn from a Gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "modules trained whole": {"r": 2, "modules_to_save": ["input_layernorm", "embed_tokens"]},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_an_imported_decoder_gives_the_logits_of_plain_peft(saved, options):
    folder, output = saved(LoraConfig, target_modules=ATTENTION, **options)
    found = read_peft(folder)

    assert found.peft is None
    torch.testing.assert_close(computed(found), output.logits, rtol=0, atol=1e-5)


def test_a_decoder_s_classifier_becomes_a_head_over_the_labels(saved):
    folder, output = saved(
        LoraConfig,
        AutoModelForSequenceClassification,
        task_type="SEQ_CLS",
        target_modules=ATTENTION,
        r=2,
    )
    found = read_peft(folder, labels=["bad", "good", "so-so"])

    assert found.model.labels == found.seen_labels == ("bad", "good", "so-so")
    torch.testing.assert_close(computed(found), output.logits, rtol=0, atol=1e-5)
    with pytest.raises(NotImportable, match="the classifier has 3 labels, and 2 are given"):
        read_peft(folder, labels=["bad", "good"])


def test_half_precision_factors_are_read_as_they_are(saved):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    path = folder / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    found = read_peft(folder)

    assert {t.dtype for t in found.tensors.values()} == {torch.float32}
    a = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(found.tensors[a], halves[f"base_model.model.{a}"].float())


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "alora", "bdlora"])
def test_what_weft_exports_comes_back_bit_for_bit(tiny_decoder, tmp_path, name, tiny_options):
    spec = ModelSpec(id=str(tiny_decoder), kind="causal-lm")
    spec = replace(spec, hash=models.base_hash(spec))
    options = {"r": 4, "alpha": 6.0, **tiny_options.get(name, {})}
    base, adapter = models.load(spec), ADAPTERS.get(name).build(**options)
    adapter.attach(base.backbone, {})
    tensors = adapter.read(base.backbone)
    adapter.detach(base.backbone)
    (tmp_path / "out").mkdir()
    export_peft(tmp_path / "out", tensors=tensors, spec=spec, card="", extra={})

    found = read_peft(tmp_path / "out")

    # an export says rsLoRA's scaling by its alpha, so that a reader need not know rsLoRA
    assert (found.adapter.name, found.model) == ("lora" if name == "rslora" else name, spec)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())


def test_biases_that_weft_exports_come_back(tiny_encoder, tmp_path):
    spec = ModelSpec(id=str(tiny_encoder), kind="classification", labels=("bad", "good"))
    spec = replace(spec, hash=models.base_hash(spec))
    base = models.load(spec)
    adapter = ADAPTERS.get("lora").build(
        r=2, target_modules=["query"], bias="all", modules_to_save=["embeddings.LayerNorm"]
    )
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec)
    tensors = {**adapter.read(model.backbone), **model.head_tensors()}
    adapter.detach(base.backbone)
    tensors = {n: t + 0.25 if ".shift." in n else t for n, t in tensors.items()}
    (tmp_path / "out").mkdir()
    export_peft(tmp_path / "out", tensors=tensors, spec=spec, card="", extra={})

    found = read_peft(tmp_path / "out")

    assert found.adapter.options["bias"] == "all"
    assert found.adapter.options["modules_to_save"] == [r"embeddings\.LayerNorm"]
    assert found.tensors.keys() == tensors.keys()
    torch.testing.assert_close(found.tensors, tensors, rtol=0, atol=1e-6)
    computed(found)  # it fits the model


def test_an_exported_classifier_comes_back_with_its_head(tiny_encoder, tmp_path):
    spec = ModelSpec(
        id=str(tiny_encoder),
        kind="classification",
        labels=("bad", "good"),
        pooling="cls",
        max_length=16,
        compute_dtype="bf16",
    )
    spec = replace(spec, hash=models.base_hash(spec))
    base, adapter = models.load(replace(spec, compute_dtype="float32", hash="")), None
    adapter = ADAPTERS.get("lora").build(r=2)
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec)
    tensors = {**adapter.read(model.backbone), **model.head_tensors()}
    adapter.detach(base.backbone)
    (tmp_path / "out").mkdir()
    export_peft(
        tmp_path / "out", tensors=tensors, spec=spec, card="", extra={"seen_labels": ["bad"]}
    )

    found = read_peft(tmp_path / "out")

    assert (found.model, found.seen_labels) == (spec, ("bad",))
    assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())


KEPT = {
    "IA3": (
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "weft trains no IA3",
    ),
    "VeRA": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"]}, "weft trains no VERA"),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "no PROMPT_TUNING"),
    "an adapted embedding": (
        "LoraConfig",
        {"r": 2, "target_modules": ["embed_tokens"]},
        "embed_tokens",
    ),
    "PiSSA": (
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        "PEFT changes the base weights",
    ),
    "rows of an embedding": (
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trains rows of an embedding",
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about its own initialisations
@pytest.mark.parametrize(("config", "options", "why"), KEPT.values(), ids=KEPT)
def test_what_weft_has_no_place_for_stays_as_peft_wrote_it(saved, config, options, why):
    folder, _ = saved(getattr(peft, config), **options)
    found = read_peft(folder)

    assert why in found.why
    assert found.peft is not None
    assert "base_model_name_or_path" not in found.peft
    written = load_file(folder / "adapter_model.safetensors")
    assert found.tensors.keys() == written.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in written.items())


def test_a_headless_encoder_stays_as_peft_wrote_it(saved, tiny_encoder):
    folder, _ = saved(
        LoraConfig,
        AutoModel,
        tiny_encoder,
        task_type="FEATURE_EXTRACTION",
        target_modules=["query"],
        r=2,
    )
    assert "it has no head" in read_peft(folder).why


def test_a_base_that_moved_is_given(saved, tiny_decoder):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(NotImportable, match="does not say its base model; give --base MODEL"):
        read_peft(folder)
    assert read_peft(folder, base=str(tiny_decoder)).model.id == str(tiny_decoder)


def test_an_adapter_of_another_base_is_refused(saved, tiny_encoder):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["task_type"] = "FEATURE_EXTRACTION"
    head = {"head.weight": torch.ones(2, 32), "head.bias": torch.ones(2)}
    save_file(head, folder / "head.safetensors")
    (folder / "weft.json").write_text(json.dumps({"labels": ["a", "b"]}))
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(NotImportable, match=r"has no linear layer model\.layers\.0"):
        read_peft(folder, base=str(tiny_encoder))


def test_a_base_other_than_weft_exported_for_is_refused(tiny_decoder, tmp_path, saved):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    facts = {"kind": "causal-lm", "base": {"hash": "ab" * 32, "compute_dtype": "float32"}}
    (folder / "weft.json").write_text(json.dumps(facts))
    with pytest.raises(models.BaseMismatch, match=r"the adapter was trained on ababab.*--base"):
        read_peft(folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, "q_proj lacks its lora_A.weight"),
        (
            {A: torch.ones(2, 7)},
            r"factors \[2, 32\] and \[32, 2\] fit the base model, got \[2, 7\]",
        ),
        ({B: torch.ones(31, 2)}, r"got \[2, 32\] and \[31, 2\]"),
        ({A: torch.ones(3, 32), B: torch.ones(32, 3)}, "the rank 2, and its tensors have 3"),
        ({A: torch.ones(2, 32, dtype=torch.int8)}, "must be a matrix of floating point"),
        ({A: torch.ones(2)}, "must be a matrix of floating point"),
        ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "1 of 4 layers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, change, message):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in {**load_file(path), **change}.items() if t is not None}, path)
    with pytest.raises(NotImportable, match=message):
        read_peft(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "MAGIC"}, "PEFT has no method called 'MAGIC'"),
        ({"peft_type": None}, "PEFT has no method called None"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number > 0, got '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number > 0, got nan"),
        ({"rank_pattern": {"q_proj": 5}}, "the rank 5, and its tensors have 2"),
        ({"alpha_pattern": {"(": 5}}, "alpha_pattern cannot be read"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern cannot be read"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(saved, change, message):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(NotImportable, match=message):
        read_peft(folder)


def test_a_pickle_is_refused_with_the_reason(saved):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(NotImportable, match=r"as a pickle \(adapter_model.bin\), which can run"):
        read_peft(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NotImportable, match="is truncated or altered"):
        read_peft(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(saved, text):
    folder, _ = saved(LoraConfig, target_modules=ATTENTION, r=2)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(NotImportable, match="JSON"):
        read_peft(folder)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(NotImportable, match=r"has no adapter_config\.json"):
        read_peft(tmp_path)
