"""Every adapter method through whole runs: federated, reproduced, evaluated and exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import DataSpec
from clients.data import Batch
from orchestrator import service
from orchestrator.config import parse_config
from orchestrator.merging import beneath

_TOKENS = torch.tensor([[5, 9, 11, 40, 8, 3], [6, 7, 30, 11, 0, 0]])
_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def dialogue(tmp_path: Path, tiny_decoder: Path, tiny_options: Mapping[str, Any]) -> Callable:
    """Makes the config of two rounds of a method at two clients of a tiny decoder."""
    prompts = ("the cat learns", "a dog sings", "private data", "the model weaves a thread")
    rows = [
        {"prompt": f"{text} {number} *", "completion": f"{number} thread"}
        for number in range(4)
        for text in prompts
    ]
    file = tmp_path / "dialogue.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def make(method: str, **changes: Any) -> dict[str, Any]:
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], **tiny_options.get(method, {})}
        return {
            "name": "talk",
            "model": {"id": str(tiny_decoder), "max_length": 32},
            "task": "causal-lm",
            "adapter": {"name": method, **options},
            "strategy": "fedavg",
            "optimizer": {"name": "adamw", "lr": 0.05},
            "rounds": 2,
            "steps": 2,
            "batch_size": 8,
            "clients": {
                "simulate": {"data": f"jsonl:{file}", "by": "iid", "parts": 2, "public": True}
            },
            "backend": "inline",
            **changes,
        }

    return make


def _logits(
    spec: Any, method: str, options: Mapping[str, Any], tensors: Any, underlay: Any
) -> torch.Tensor:
    backbone = models.load(spec).backbone
    adapter = ADAPTERS.get(method).build(**options)
    model = models.TaskModel(adapter.attach(backbone, underlay), spec)
    adapter.write(backbone, tensors)
    with torch.no_grad():
        logits = model(Batch(_TOKENS, _MASK, _TOKENS))
    adapter.detach(backbone)
    return logits


@pytest.mark.parametrize("method", ADAPTERS.names())
def test_a_method_is_federated_reproduced_and_exported(
    tmp_path: Path, dialogue: Callable[..., dict[str, Any]], method: str
) -> None:
    document = dialogue(method)
    workspace = service.open_workspace(tmp_path / "home")
    version = service.launch(workspace, parse_config(document))
    elsewhere = service.open_workspace(tmp_path / "elsewhere")
    assert service.launch(elsewhere, parse_config(document)) == version

    lineage = service.lineage(workspace, version).lineage
    first = next(v for v in lineage.nodes.values() if v.recipe["round"] == 0)
    before, after = workspace.store.tensors(first.id), workspace.store.tensors(version)
    frozen = ADAPTERS.get(method).build().frozen
    kept = {n for n in before if n.endswith(".scaling") or re.fullmatch(frozen, n)}
    assert kept < before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in kept), name

    data = DataSpec(document["clients"]["simulate"]["data"])
    scores = [service.evaluate(workspace, v, data).metrics["loss"] for v in (first.id, version)]
    assert scores[1] < scores[0]

    _assert_exported_as_computed(workspace, document, version, first, tmp_path / "export")


def test_a_private_run_of_dora_is_exported_as_it_computes(
    tmp_path: Path, dialogue: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    privacy = {"noise_multiplier": 0.5, "delta": 1e-2, "insecure_seed": 3}
    document = dialogue("dora", privacy=privacy)
    workspace = service.open_workspace(tmp_path / "home")
    version = service.launch(workspace, parse_config(document))
    assert not [r for r in caplog.records if r.name == "clients.verification"]

    view = service.lineage(workspace, version)
    assert len(view.epsilons) == 2
    first = next(v for v in view.lineage.nodes.values() if v.recipe["round"] == 0)
    _assert_exported_as_computed(workspace, document, version, first, tmp_path / "export")


def _assert_exported_as_computed(
    workspace: service.Workspace, document: Mapping[str, Any], version: str, first: Any, to: Path
) -> None:
    """Hold the logits of an exported version against those of its tensors, and of the first's."""
    service.export(workspace, version, to)
    base = AutoModelForCausalLM.from_pretrained(document["model"]["id"])
    plain = PeftModel.from_pretrained(base, to).eval()
    with torch.no_grad():
        theirs = plain(input_ids=_TOKENS, attention_mask=_MASK).logits
    spec = parse_config(document).model_spec()
    method = document["adapter"]["name"]
    options = {k: v for k, v in document["adapter"].items() if k != "name"}
    underlay = beneath(workspace.store, (), first.recipe["offset"])
    before, after = (workspace.store.tensors(v) for v in (first.id, version))
    ours = _logits(spec, method, options, after, underlay)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, _logits(spec, method, options, before, underlay), atol=1e-4)


def test_a_version_that_leaves_modules_out_is_evaluated_as_it_was_trained(
    tmp_path: Path, dialogue: Callable[..., dict[str, Any]]
) -> None:
    left_out = {"target_modules": "all-linear", "exclude_modules": ["v_proj", "o_proj"]}
    document = dialogue("lora", rounds=1, adapter={"name": "lora", "r": 2, **left_out})
    workspace = service.open_workspace(tmp_path / "home")
    version = service.launch(workspace, parse_config(document))
    layers = {n.split(".")[-3] for n in workspace.store.tensors(version) if "lora_A" in n}
    assert layers == {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"}
    data = DataSpec(document["clients"]["simulate"]["data"])
    assert service.evaluate(workspace, version, data).metrics["loss"] > 0
