"""Whole runs whose adapter starts from the base weights or from public data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import AutoModel

from clients import data
from clients.assignment import NO_DATA, DataSpec, PluginChoice
from clients.session import opened
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config
from orchestrator.drawing import lineage_tree
from orchestrator.merging import task_vector
from orchestrator.report import version_table

Document = Callable[..., dict[str, Any]]
LAYER = "encoder.layer.0.attention.self.query"
TEXTS = ("where is it now", "go away and do not come back to this house", "hello")


KASA = {"name": "kasa", "r": 4, "alpha": 6.0, "target_modules": ["query", "value"]}


def lora(init: str, **options: Any) -> dict[str, Any]:
    return {**KASA, "name": "lora", "init": init, **options}


def public(document: dict[str, Any]) -> dict[str, Any]:
    simulated = document["clients"]["simulate"]["data"]
    return {"data": simulated, "examples": 12, "public": True}


@pytest.fixture
def workspace(tmp_path: Path) -> service.Workspace:
    return service.open_workspace(tmp_path / "home")


def features(workspace: service.Workspace, ref: str, used: bool = True) -> Tensor:
    """What a version's body computes on weft's own model; with ``used`` off, the base model's."""
    assignment = service.use(workspace, workspace.store.version(ref), NO_DATA)
    assignment = replace(assignment, device="cuda" if torch.cuda.is_available() else "cpu")
    with opened(assignment) as session, torch.no_grad():
        if used:
            session.write(assignment.broadcast.tensors)
        batch = session.base.tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        batch = batch.to(assignment.device)
        found = session.model.backbone(batch["input_ids"], batch["attention_mask"])
        return found.last_hidden_state.cpu()


def plain(folder: str, adapter: Path | None = None) -> Tensor:
    """What plain transformers, with plain PEFT's adapter if any, computes of the same texts."""
    from transformers import AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    batch = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def start_of(workspace: service.Workspace, version: str) -> str:
    nodes = workspace.store.lineage(version).nodes.values()
    return next(v.id for v in nodes if v.recipe["kind"] == "start")


def product(tensors: Any, layer: str = LAYER) -> Tensor:
    b, a = tensors[f"{layer}.lora_B.weight"].double(), tensors[f"{layer}.lora_A.weight"].double()
    return tensors[f"{layer}.scaling"].double() * b @ a


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga"])
def test_a_run_starts_as_the_base_model_and_its_export_is_what_it_learned(
    workspace: service.Workspace, document: Document, tmp_path: Path, init: str
) -> None:
    reads = init in ("eva", "corda", "lora_ga")
    config = document(adapter=lora(init), rounds=1)
    config |= {"init_data": public(config)} if reads else {}
    version = service.launch(workspace, parse_config(config))
    base = plain(config["model"])

    assert error(features(workspace, start_of(workspace, version)), base) < 1e-4
    assert error(features(workspace, version), base) > 1e-3

    service.export(workspace, version, tmp_path / "export")
    exported = plain(config["model"], tmp_path / "export")
    assert error(exported, features(workspace, version)) < 1e-4


def test_an_offset_is_a_version_that_runs_share_and_lineage_shows(
    workspace: service.Workspace, document: Document
) -> None:
    first = service.launch(workspace, parse_config(document(adapter=lora("pissa"), rounds=1)))
    other = document(adapter=lora("pissa"), rounds=1, name="other", seed=5, strategy="fedavg")
    second = service.launch(workspace, parse_config(other))

    recipes = [workspace.store.version(v).recipe for v in (first, second)]
    assert recipes[0]["offset"] == recipes[1]["offset"]
    assert first != second
    found = service.lineage(workspace, first).lineage
    [edge] = [e for e in found.edges if e.kind == "offset"]
    assert (edge.child, edge.parent) == (start_of(workspace, first), recipes[0]["offset"])
    offset = found.nodes[edge.parent].recipe
    assert (offset["kind"], offset["seed"], offset["init_data"]) == ("offset", None, None)
    assert set(offset["model"]) == {"id", "hash"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(lineage_tree(service.lineage(workspace, first)))
    console.print(version_table(found.nodes[edge.parent], []))
    console.print(version_table(found.nodes[first], []))
    shown = console.export_text()
    assert f"offset ← {edge.parent[:12]} offset of lora (pissa)" in shown
    assert "start of lora (pissa) (fresh)" in shown
    assert shown.count(edge.parent[:12]) == 3  # in the tree, its own id, the version's offset


def test_a_start_from_data_says_from_which_and_not_where_they_are(
    workspace: service.Workspace, document: Document
) -> None:
    config = document(adapter=lora("corda"), rounds=1)
    config["init_data"] = public(config)
    version = service.launch(workspace, parse_config(config))

    start = workspace.store.version(start_of(workspace, version)).recipe
    offset = workspace.store.version(start["offset"]).recipe
    assert start["init_data"] == offset["init_data"]
    assert start["init_data"]["examples"] == 12
    assert len(start["init_data"]["fingerprint"]) == 64
    where = data.parse_uri(config["init_data"]["data"]).path
    assert where not in json.dumps([start, offset])
    again = service.launch(workspace, parse_config({**config, "name": "other", "seed": 1}))
    assert workspace.store.version(again).recipe["offset"] != start["offset"]  # other examples


def test_an_offset_is_nothing_by_itself(
    workspace: service.Workspace, document: Document, tmp_path: Path
) -> None:
    version = service.launch(workspace, parse_config(document(adapter=lora("olora"), rounds=1)))
    offset = workspace.store.version(version).recipe["offset"]

    for use in (
        lambda: service.export(workspace, offset, tmp_path / "export"),
        lambda: service.evaluate(workspace, offset, DataSpec("builtin:parameter-types")),
        lambda: service.merge(workspace, [version, offset], PluginChoice("cat"), "both"),
        lambda: service.launch(
            workspace, parse_config(document(start="stack", start_from=offset, rounds=1))
        ),
    ):
        with pytest.raises(ValueError, match=f"{offset[:12]} is the offset that other versions"):
            use()


@pytest.mark.parametrize("method", [lora("pissa"), KASA])
def test_a_continued_run_keeps_the_offset_and_a_stacked_one_makes_its_own(
    workspace: service.Workspace, document: Document, method: dict[str, Any]
) -> None:
    base = document(adapter=method, strategy="fedavg", rounds=1)
    first = service.launch(workspace, parse_config(base))
    after = {**base, "start_from": "task-1", "start": "continue"}
    on = service.launch(workspace, parse_config(after))
    stacked = service.launch(
        workspace, parse_config({**base, "name": "task-2", "start_from": first, "start": "stack"})
    )

    one, two, three = (workspace.store.version(v).recipe for v in (first, on, stacked))
    assert one["offset"] == two["offset"] != three["offset"]
    start = [e.child for e in workspace.store.lineage(on).edges if e.kind == "continue"]
    assert error(features(workspace, start[0]), features(workspace, first)) < 1e-6
    assert three["stack"] == [first]
    ground, top = (
        task_vector(workspace.store, workspace.store.version(v)) for v in (first, stacked)
    )
    whole = service.use(workspace, workspace.store.version(stacked), NO_DATA)
    expected = product(ground) + product(top)
    assert torch.allclose(product(whole.broadcast.tensors), expected, atol=1e-5)


def test_an_adapter_stacked_on_a_started_one_begins_where_that_one_ended(
    workspace: service.Workspace, document: Document
) -> None:
    first = service.launch(workspace, parse_config(document(adapter=lora("pissa"), rounds=1)))
    stack = {"name": "task-2", "start": "stack", "start_from": first, "rounds": 1}
    second = service.launch(workspace, parse_config(document(adapter=lora("olora"), **stack)))

    began = start_of(workspace, second)
    assert error(features(workspace, began), features(workspace, first)) < 1e-4


@pytest.mark.parametrize("names", [("pissa", "olora"), ("pissa", "kasa"), ("kaiming", "kasa")])
def test_a_merge_is_the_sum_of_what_the_versions_change(
    workspace: service.Workspace, document: Document, tmp_path: Path, names: tuple[str, str]
) -> None:
    versions = []
    for name in names:
        adapter = KASA if name == "kasa" else lora(name)
        config = document(adapter=adapter, name=name, strategy="fedavg", rounds=1)
        versions.append(service.launch(workspace, parse_config(config)))

    merged = service.merge(workspace, versions, PluginChoice("cat"), "both")

    parts = [task_vector(workspace.store, workspace.store.version(v)) for v in versions]
    for layer in (n.removesuffix(".scaling") for n in parts[0] if n.endswith(".scaling")):
        got = product(workspace.store.tensors(merged), layer)
        assert torch.allclose(got, sum(product(part, layer) for part in parts), atol=1e-5)
    assert workspace.store.version(merged).recipe.get("offset") is None
    service.export(workspace, merged, tmp_path / "export")
    exported = plain(document()["model"], tmp_path / "export")
    assert error(exported, features(workspace, merged)) < 1e-4


def test_kasa_trains_its_diagonal_and_exports_as_a_plain_adapter(
    workspace: service.Workspace, document: Document, tmp_path: Path
) -> None:
    kasa = {"name": "kasa", "r": 4, "target_modules": ["query", "value"]}
    config = document(adapter=kasa, strategy="fedavg", regularizers=["kasa"], rounds=2)
    version = service.launch(workspace, parse_config(config))

    before = workspace.store.tensors(start_of(workspace, version))
    after = workspace.store.tensors(version)
    assert not torch.equal(before[f"{LAYER}.lora_diag"], after[f"{LAYER}.lora_diag"])
    service.export(workspace, version, tmp_path / "export")
    exported = plain(config["model"], tmp_path / "export")
    assert error(exported, features(workspace, version)) < 1e-4


def test_a_merge_of_kasa_adapters_is_not_continued_as_one(
    workspace: service.Workspace, document: Document
) -> None:
    kasa = KASA
    versions = [
        service.launch(
            workspace,
            parse_config(document(adapter=kasa, strategy="fedavg", rounds=1, seed=seed)),
        )
        for seed in (0, 1)
    ]
    service.merge(workspace, versions, PluginChoice("cat"), "both")
    config = document(adapter=kasa, strategy="fedavg", start="continue", start_from="both")

    with pytest.raises(ValueError, match="kasa also has lora_diag; start: stack"):
        service.launch(workspace, parse_config(config))


def test_ranks_that_eva_moves_travel_through_rounds_merge_and_export(
    workspace: service.Workspace, document: Document, tmp_path: Path
) -> None:
    adapter = {"name": "rslora", "r": 2, "target_modules": "all-linear", "init": "eva"}
    config = document(adapter=adapter, rounds=2)
    config["init_data"] = public(config)
    version = service.launch(workspace, parse_config(config))

    tensors = workspace.store.tensors(version)
    ranks = {len(t) for name, t in tensors.items() if name.endswith("lora_A.weight")}
    assert len(ranks) > 1
    service.export(workspace, version, tmp_path / "export")
    exported = plain(config["model"], tmp_path / "export")
    assert error(exported, features(workspace, version)) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_a_private_run_measures_each_examples_gradient_over_an_offset(
    workspace: service.Workspace, document: Document, init: str
) -> None:
    # the local loop compares its per-example gradients with a loop over examples, or fails
    config = document(True, adapter=lora(init), rounds=1)
    config |= {"init_data": public(config)} if init == "lora_ga" else {}
    version = service.launch(workspace, parse_config(config))

    assert len(service.lineage(workspace, version).epsilons) == 3


@pytest.mark.parametrize(("kind", "count"), [("started", 1), ("committed", 1)])
def test_a_run_killed_and_resumed_finds_its_offset_and_computes_it_once(
    tmp_path: Path,
    document: Document,
    killed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    count: int,
) -> None:
    config = document(adapter=lora("pissa"), rounds=2)
    wanted = service.launch(service.open_workspace(tmp_path / "whole"), parse_config(config))

    killed(tmp_path / "killed", config, kind, count)
    broken = service.open_workspace(tmp_path / "killed")
    monkeypatch.setattr("clients.worker.initial_update", lambda a: pytest.fail("made again"))
    assert service.resume(broken, "task-1") == wanted


@pytest.mark.slow
@pytest.mark.ray
def test_starts_on_ray_and_inline_end_at_the_same_versions(
    workspace: service.Workspace, document: Document
) -> None:
    configs = []
    for init in ("pissa_niter_4", "corda", "lora_ga", "eva"):
        config = document(adapter=lora(init), rounds=1, name=init.replace("_", "-"))
        configs.append(config | ({} if init.startswith("pissa") else {"init_data": public(config)}))
    ray = RayBackend(workers=2)
    try:
        there = [service.launch(workspace, parse_config(c), backend=ray) for c in configs]
    finally:
        ray.close()
    here = [service.launch(workspace, parse_config(c), backend=InlineBackend()) for c in configs]

    assert there == here


@pytest.mark.gpu
@pytest.mark.parametrize("init", ["loftq", "pissa", "corda"])
def test_an_nf4_run_starts_from_its_quantised_base_or_nearer_to_the_whole_one(
    workspace: service.Workspace, document: Document, init: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("bitsandbytes")
    folder = document()["model"]
    config = document(
        model={"id": folder, "quantization": "nf4"}, adapter=lora(init), device="cuda", rounds=1
    )
    config |= {"init_data": public(config)} if init == "corda" else {}
    version = service.launch(workspace, parse_config(config))

    start = start_of(workspace, version)
    quantised = features(workspace, start, used=False)
    if init == "loftq":
        whole = plain(folder)
        assert error(features(workspace, start), whole) < error(quantised, whole)
    else:
        assert error(features(workspace, start), quantised) < 1e-3
