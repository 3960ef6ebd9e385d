"""The base model's weights are the system's one copy, whoever maps them and whatever they do."""

import json
import logging
import subprocess
import sys
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from clients import models
from clients.assignment import ModelSpec, Privacy
from clients.trainer import train

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux says what a page is"
)


@pytest.fixture(autouse=True)
def nothing_resident(monkeypatch):
    monkeypatch.setattr(models, "_resident", None)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pages(model) -> list[tuple[str, int]]:
    """Return where each parameter lies: the mapped file, and kB there that are not the file's."""
    regions = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            regions.append([int(first.split("-")[0], 16), rest[-1] if len(rest) > 4 else "", 0])
        elif first == "Anonymous:":  # a page that was only read is the file's
            regions[-1][2] = int(rest[0])
    starts = [region[0] for region in regions]
    found = [regions[bisect_right(starts, p.data_ptr()) - 1] for p in model.parameters()]
    return [(name, own) for _, name, own in found]


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_every_base_weight_is_mapped_and_equals_the_one_that_transformers_loads(
    kind, dtype, tiny_encoder, tiny_decoder, own_cache
):
    folder = tiny_encoder if kind == "classification" else tiny_decoder
    labels = ("a", "b") if kind == "classification" else ()
    spec = ModelSpec(str(folder), kind, labels=labels, compute_dtype=dtype)

    backbone = models.load(spec).backbone

    place = str(folder if dtype == "float32" else own_cache)
    assert {(file.startswith(place), own) for file, own in pages(backbone)} == {(True, 0)}
    plain = AutoModel if kind == "classification" else AutoModelForCausalLM
    wanted = plain.from_pretrained(folder, dtype=models._DTYPES[dtype])
    theirs = dict(wanted.named_parameters()) | dict(wanted.named_buffers())
    ours = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_tied_weights_are_mapped_once(tiny_decoder, tmp_path, own_cache):
    config = AutoConfig.from_pretrained(tiny_decoder)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    models.tokenizer(ModelSpec(str(tiny_decoder), "causal-lm")).save_pretrained(tmp_path / "tied")

    for dtype in ("float32", "bf16"):
        spec = ModelSpec(str(tmp_path / "tied"), "causal-lm", compute_dtype=dtype)
        backbone = models.load(spec).backbone
        assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
        assert {(bool(file), own) for file, own in pages(backbone)} == {(True, 0)}


@pytest.mark.parametrize("privacy", [None, Privacy(1.0, 1.0, 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_training_makes_no_page_of_the_base_its_own(assign, dtype, privacy):
    assignment = assign()
    assignment = assign(
        model=replace(assignment.model, compute_dtype=dtype), privacy=privacy, steps=3
    )

    train(assignment)

    backbone = models.load(assignment.model).backbone
    assert {(bool(file), own) for file, own in pages(backbone)} == {(True, 0)}


def test_a_write_to_a_base_weight_stays_in_the_process(tiny_encoder, own_cache):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("a", "b"), compute_dtype="bf16")
    weight = next(models.load(spec).backbone.parameters())
    [file] = own_cache.rglob("*.safetensors")
    before = file.read_bytes()

    weight.add_(1)

    assert file.read_bytes() == before


def test_processes_that_convert_at_once_make_one_copy(tiny_encoder, own_cache):
    script = (
        "import json, sys\n"
        "from clients import models\n"
        "from clients.assignment import ModelSpec\n"
        "kept = models.load(ModelSpec(sys.argv[1], 'classification', compute_dtype='bf16'))\n"
        "print(json.dumps([float(p.float().sum()) for p in kept.backbone.parameters()]))\n"
    )
    command = [sys.executable, "-c", script, str(tiny_encoder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    sums = [json.loads(process.communicate(timeout=60)[0]) for process in both]

    assert sums[0] == sums[1]
    assert len(list(own_cache.rglob("*.safetensors"))) == 1
    assert [p for p in (own_cache / "weights").iterdir() if p.name.startswith("tmp")] == []


def test_a_cache_that_cannot_be_written_costs_memory_and_is_said(
    tiny_encoder, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "file"))
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("a", "b"), compute_dtype="bf16")

    with caplog.at_level(logging.WARNING):
        backbone = models.load(spec).backbone

    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert "each holds its own" in caplog.text
    assert "WEFT_CACHE" in caplog.text
