"""Adapters for tags as others use them: exported, loaded by transformers and PEFT, taken in."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, ModernBertConfig

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.export import export_peft
from clients.importing import NotImportable, read_peft
from clients.tagger import tagger_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.tensor([[2, 9, 11, 40, 3], [2, 7, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LABELS = ("O", "B-CAT", "I-CAT")


@pytest.fixture(params=["tiny_encoder", "tiny_decoder"])
def spec(request):
    folder = str(request.getfixturevalue(request.param))
    made = ModelSpec(folder, "token-classification", labels=LABELS, max_length=16)
    return replace(made, hash=models.base_hash(made))


def trained(spec, name="lora", **options):
    """Return tensors as training leaves them, and weft's own logits."""
    base, adapter = models.load(spec), ADAPTERS.get(name).build(**options)
    torch.manual_seed(3)
    model = models.TaskModel(adapter.attach(base.backbone, {}), spec)
    with torch.no_grad():
        for parameter in [*adapter.parameters(model.backbone).values(), *model.head.parameters()]:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        logits = model(Batch(TOKENS, MASK, torch.zeros_like(TOKENS)))
    tensors = {**adapter.factored(adapter.read(model.backbone)), **model.head_tensors()}
    adapter.detach(model.backbone)
    return tensors, logits


def exported(folder, spec, tensors, **extra):
    folder.mkdir()
    export_peft(folder, tensors=tensors, spec=spec, card="Tags.", extra=extra)
    return folder


def code_of(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 4, "rank_pattern": {r"\S*\.0\.\S+": 2}},
        {"r": 2, "target_modules": "all-linear"},
    ],
    ids=["lora", "ranks by layer", "all linear"],
)
def test_plain_peft_and_transformers_give_the_same_logits(spec, tmp_path, options):
    tensors, logits = trained(spec, **options)
    folder = exported(tmp_path / "out", spec, tensors)

    model = AutoPeftModelForTokenClassification.from_pretrained(folder, num_labels=3).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=MASK).logits

    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    assert not (folder / "head.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


def test_what_is_exported_comes_back_bit_for_bit(spec, tmp_path):
    tensors, _ = trained(spec, r=4, alpha=6.0)
    folder = exported(tmp_path / "out", spec, tensors, seen_labels=["O"])

    found = read_peft(folder)

    assert (found.model, found.seen_labels, found.adapter.name) == (spec, ("O",), "lora")
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_labels_given_anew_are_what_a_tagger_has_seen(tiny_encoder, tmp_path):
    spec = ModelSpec(str(tiny_encoder), "token-classification", labels=LABELS)
    spec = replace(spec, hash=models.base_hash(spec))
    tensors, _ = trained(spec, r=2)
    folder = exported(tmp_path / "out", spec, tensors, seen_labels=["O", "B-CAT"])

    found = read_peft(folder, labels=("O", "B-PET", "I-PET"))

    assert found.seen_labels == found.model.labels == ("O", "B-PET", "I-PET")


def test_the_code_in_the_card_tags_a_text(spec, tmp_path, monkeypatch, capsys):
    tensors, _ = trained(spec, r=2)
    folder = exported(tmp_path / "out", replace(spec, max_length=64), tensors)
    assert "pipeline_tag: token-classification" in (folder / "README.md").read_text()

    monkeypatch.chdir(folder)
    exec(code_of(folder), {})

    said = [line.rpartition(" ") for line in capsys.readouterr().out.splitlines()]
    assert {tag for *_, tag in said} <= set(LABELS)
    assert "".join(piece for piece, *_ in said).replace(" ", "") == "afirsttextwithsomewords"


def test_a_tagger_that_others_trained_is_taken_in_with_its_head(tiny_encoder, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForTokenClassification.from_pretrained(tiny_encoder, num_labels=3)
    config = LoraConfig(task_type="TOKEN_CLS", target_modules=["query"], r=2)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        wanted = model(input_ids=TOKENS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path / "theirs")

    found = read_peft(tmp_path / "theirs", labels=LABELS)

    assert found.model.kind == "token-classification"
    assert found.seen_labels == LABELS
    adapter = ADAPTERS.get(found.adapter.name).build(**found.adapter.options)
    own = models.TaskModel(adapter.attach(models.load(found.model).backbone, {}), found.model)
    head = {n: t for n, t in found.tensors.items() if n.startswith("head.")}
    adapter.write(own.backbone, {n: t for n, t in found.tensors.items() if n not in head})
    own.write_head(head)
    with torch.no_grad():
        logits = own(Batch(TOKENS, MASK, torch.zeros_like(TOKENS)))
    adapter.detach(own.backbone)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    with pytest.raises(NotImportable, match="the tagger has 3 tags, and 2 are given; name all"):
        read_peft(tmp_path / "theirs", labels=LABELS[:2])


@pytest.fixture
def other_head(tmp_path, tiny_encoder):
    """A ModernBERT, whose class for tagging has a dense layer and a norm before its classifier."""
    from transformers import AutoTokenizer, ModernBertModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    ModernBertModel(config).save_pretrained(tmp_path / "modern")
    tokenizer.save_pretrained(tmp_path / "modern")
    return ModelSpec(str(tmp_path / "modern"), "token-classification", labels=LABELS)


def test_where_transformers_has_another_head_weft_s_lies_beside_the_adapter(
    other_head, tmp_path, monkeypatch
):
    assert tagger_of(other_head) is None
    spec = replace(other_head, hash=models.base_hash(other_head))
    tensors, logits = trained(spec, r=2, target_modules=["Wqkv"])

    folder = exported(tmp_path / "out", spec, tensors)

    assert load_file(folder / "head.safetensors").keys() == {"head.weight", "head.bias"}
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code_of(folder), names)
    with torch.no_grad():
        hidden = names["model"](input_ids=TOKENS, attention_mask=MASK).last_hidden_state
    theirs = hidden @ names["head"]["head.weight"].T + names["head"]["head.bias"]
    torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5)
    assert names["logits"].shape[2] == 3
    found = read_peft(folder)
    assert found.model.kind == "token-classification"
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
