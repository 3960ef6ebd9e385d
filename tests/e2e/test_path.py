"""The demo's whole path on tiny models: federate, stack, merge, trace, export."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModel, AutoTokenizer

from clients.assignment import DataSpec, PluginChoice
from orchestrator import service
from orchestrator.backends.base import Backend
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config


@pytest.mark.ray
def test_the_whole_path_on_ray_and_inline_ends_at_the_same_versions(
    tmp_path: Path, shared: Path
) -> None:
    """On a pretrained model and real news, with and without DP, down to the merge's id."""
    packed = (shared / "agnews.train.jsonl.gz").read_bytes()
    news = tmp_path / "news.jsonl"
    news.write_text("\n".join(gzip.decompress(packed).decode().splitlines()[:160]))
    topics = ["world", "sports", "business", "science"]
    workspace = service.open_workspace(tmp_path / "home")

    def path(backend: Backend, dp: bool) -> tuple[str, str, str]:
        document: dict[str, Any] = {
            "model": {"id": str(shared / "models" / "tinystories-llama-260k"), "max_length": 48},
            "labels": topics,
            "adapter": {"name": "lora", "r": 4},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "regularizers": [{"name": "o-lora", "form": "hard"}],
            "rounds": 2,
            "steps": 2,
            "batch_size": 8,
            "clients": {
                "simulate": {"data": f"jsonl:{news}", "by": "dirichlet", "parts": 3, "public": True}
            },
        }
        if dp:
            document["privacy"] = {"epsilon": 8, "delta": 1e-3, "insecure_seed": 1}
        one = {"name": "task-1", "task_labels": topics[:2]}
        first = service.launch(workspace, parse_config(document | one), backend=backend)
        two = {"name": "task-2", "task_labels": topics[2:], "start": "stack", "start_from": first}
        second = service.launch(workspace, parse_config(document | two), backend=backend)
        merged = service.merge(workspace, [first, second], PluginChoice("svd"), "news")
        return first, second, merged

    ray = RayBackend(workers=2)
    try:
        there = [path(ray, dp) for dp in (False, True)]
    finally:
        ray.close()
    here = [path(InlineBackend(), dp) for dp in (False, True)]
    assert there == here
    assert len({version for versions in here for version in versions}) == 6
    folder = tmp_path / "export"
    service.export(workspace, here[1][2], folder)
    base = AutoModel.from_pretrained(shared / "models" / "tinystories-llama-260k")
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].r >= 4


@pytest.mark.postgres
def test_a_run_on_postgresql_ends_at_the_version_that_it_has_on_sqlite(
    tmp_path: Path, document: Callable[..., dict[str, Any]], postgres: str
) -> None:
    config = parse_config(document(dp=True))
    here = service.launch(service.open_workspace(tmp_path / "here"), config)
    there = service.open_workspace(tmp_path / "there", postgres)
    assert service.launch(there, config) == here
    assert service.lineage(there, "task-1").lineage.root == here
    there.close()


@pytest.mark.parametrize("dp", [False, True], ids=["plain", "dp"])
def test_two_tasks_are_stacked_merged_traced_and_exported(
    tmp_path: Path, document: Callable[..., dict[str, Any]], dp: bool
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    common = {"regularizers": [{"name": "o-lora", "form": "hard"}]}
    first = service.launch(
        workspace, parse_config(document(dp, **common, task_labels=["question", "order"]))
    )
    common |= {"name": "task-2", "start": "stack", "start_from": first}
    second = service.launch(
        workspace, parse_config(document(dp, **common, task_labels=["greeting", "report"]))
    )
    tensors = [workspace.store.tensors(ref) for ref in (first, second)]
    for name in (n for n in tensors[0] if n.endswith("lora_A.weight")):
        overlap = tensors[0][name].double() @ tensors[1][name].double().T
        assert overlap.abs().max() < 1e-5, name

    merged = service.merge(workspace, [first, second], PluginChoice("cat"), "both")
    found = service.lineage(workspace, merged)
    kinds = {kind for _, _, kind in found.lineage.edges}
    assert {"merge", "stack", "init", "round"} <= kinds
    assert {v.recipe["model"]["hash"] for v in found.lineage.nodes.values()} != {""}
    assert len(found.epsilons) == (3 if dp else 0)

    data = DataSpec(document()["clients"]["simulate"]["data"])
    score = service.evaluate(workspace, merged, data)
    again = service.evaluate(workspace, second, data)  # stacked on the first: the same function
    assert score.metrics["loss"] == pytest.approx(again.metrics["loss"], rel=1e-5)
    assert set(score.label_accuracy) == {"question", "order", "greeting", "report"}

    folder = tmp_path / "export"
    service.export(workspace, merged, folder)
    base = AutoModel.from_pretrained(document()["model"])
    loaded = PeftModel.from_pretrained(base, folder)
    a, b = tensors
    name = "encoder.layer.0.attention.self.query"
    product = sum(
        t[f"{name}.scaling"] * t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"]
        for t in (a, b)
    )
    layer = loaded.base_model.model.encoder.layer[0].attention.self.query
    assert torch.allclose(layer.get_delta_weight("default"), product, atol=1e-6)


def test_a_causal_language_model_learns_from_four_clients(tmp_path: Path, shared: Path) -> None:
    packed = (shared / "dolly3k.train.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()[:200]
    file = tmp_path / "dolly.jsonl"
    file.write_text("\n".join(lines))
    workspace = service.open_workspace(tmp_path / "home")
    model = shared / "models" / "tinystories-llama-260k"
    version = service.launch(
        workspace,
        parse_config(
            {
                "name": "instructions",
                "model": {"id": str(model), "max_length": 96},
                "task": "causal-lm",
                "adapter": {"name": "lora", "r": 8, "target_modules": "all-linear"},
                "strategy": "fedavg",
                "optimizer": {"name": "adamw", "lr": 0.005},
                "rounds": 3,
                "steps": 5,
                "batch_size": 8,
                "clients": {"simulate": {"data": f"jsonl:{file}", "by": "iid", "parts": 4}},
                "backend": "inline",
            }
        ),
    )
    [record] = workspace.ledger.runs()
    losses = [
        event.data["loss"]
        for event in workspace.ledger.events(record.id)
        if event.kind == "accepted"
    ]
    assert sum(losses[-4:]) < sum(losses[:4])  # the last round of four clients, the first

    folder = tmp_path / "export"
    service.export(workspace, version, folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("Once upon a time", return_tensors="pt")
    ids = batch["input_ids"]
    assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_a_run_that_continues_starts_from_the_very_tensors(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    first = service.launch(workspace, parse_config(document()))
    second = service.launch(
        workspace, parse_config(document(start="continue", start_from="task-1", rounds=1))
    )
    found = service.lineage(workspace, second).lineage
    [child] = [edge.child for edge in found.edges if edge.kind == "continue"]
    assert found.nodes[child].tensors == found.nodes[first].tensors
    assert workspace.store.version(second).names == ("task-1:v2",)


def test_the_same_config_ends_at_the_same_version_and_another_seed_elsewhere(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    ids = [
        service.launch(service.open_workspace(tmp_path / home), parse_config(document(seed=seed)))
        for home, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_without_an_insecure_seed_two_private_runs_differ(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    private = document(True, privacy={"epsilon": 8, "delta": 1e-3}, rounds=1)
    ids = [service.launch(workspace, parse_config(private)) for _ in range(2)]
    assert ids[0] != ids[1]
    assert workspace.store.version(ids[0]).recipe["private"]
