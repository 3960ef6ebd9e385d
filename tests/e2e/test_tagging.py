"""Token classification through whole runs: federated, private, by person, merged, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clients import models
from clients.assignment import DataSpec, PluginChoice
from clients.data import BadSelection
from orchestrator import service
from orchestrator.config import parse_config

LABELS = ["O", "B-CAT", "I-CAT", "B-DOG", "I-DOG"]
CATS, DOGS = ["O", "B-CAT", "I-CAT"], ["O", "B-DOG", "I-DOG"]


@pytest.fixture
def notes(tmp_path: Path) -> str:
    """Notes of four persons in two wards: half of them tokens, half text with spans."""
    rows: list[dict[str, Any]] = []
    for number in range(16):
        word, kind = ("cat", "CAT") if number % 2 else ("dog", "DOG")
        whose = {"ward": f"w{number // 8}", "person": f"p{number % 4}"}
        if number % 3:
            tags = [f"B-{kind}", f"I-{kind}", "O", "O"]
            rows.append({"tokens": ["the", word, "sings", f"x{number}"], "tags": tags, **whose})
        else:
            spans = [{"start": 0, "end": 7, "label": kind}]
            rows.append({"text": f"the {word} learns {number}", "spans": spans, **whose})
    file = tmp_path / "notes.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return f"jsonl:{file}"


@pytest.fixture
def tagging(notes: str, tiny_encoder: Path) -> Callable[..., Any]:
    """Return a function that makes the config of a run that tags cats and dogs at two wards."""

    def make(**changes: Any) -> Any:
        simulate = {"data": notes, "by": "column", "column": "ward", "public": True}
        return parse_config(
            {
                "name": "pets",
                "model": {"id": str(tiny_encoder), "max_length": 16},
                "task": "token-classification",
                "labels": LABELS,
                "adapter": {"name": "lora", "r": 2},
                "strategy": "fedavg",
                "optimizer": {"name": "adamw", "lr": 0.05},
                "rounds": 2,
                "steps": 8,
                "batch_size": 8,
                "clients": {"simulate": simulate},
                "backend": "inline",
                **changes,
            }
        )

    return make


def test_two_tasks_of_entities_are_trained_merged_scored_and_exported(
    tmp_path: Path, notes: str, tagging: Callable[..., Any]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    judged = {"evaluate": {"data": notes, "every": 2}, "stop": {"metric": "entity_f1"}}
    cats = service.launch(workspace, tagging(task_labels=CATS, **judged))
    dogs = service.launch(workspace, tagging(name="dogs", task_labels=DOGS))
    there = DataSpec(notes)

    assert workspace.store.version(cats).metrics["entity_f1"] > 0.8
    tensors = [workspace.store.tensors(ref) for ref in (cats, dogs)]
    history = workspace.store.lineage(cats).nodes.values()
    [start] = [v for v in history if v.recipe["kind"] == "start"]
    before = workspace.store.tensors(start.id)["head.weight"]
    assert torch.equal(tensors[0]["head.weight"][3:], before[3:])  # dogs' rows, bit for bit
    assert not torch.equal(tensors[0]["head.weight"][:3], before[:3])

    merged = service.merge(workspace, ["pets", "dogs"], PluginChoice("svd", {}), "both")
    head = workspace.store.tensors(merged)["head.weight"]
    torch.testing.assert_close(head[1:3], tensors[0]["head.weight"][1:3])
    torch.testing.assert_close(head[3:], tensors[1]["head.weight"][3:])
    torch.testing.assert_close(
        head[0], (tensors[0]["head.weight"][0] + tensors[1]["head.weight"][0]) / 2
    )
    found = service.evaluate(workspace, "both", there)
    assert found.metrics.keys() >= {"entity_f1", "entity_precision", "entity_recall", "accuracy"}

    service.export(workspace, "both", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], head)
    back = service.import_adapter(workspace, tmp_path / "out", "again")
    again = service.evaluate(workspace, back.version, there)
    assert again.metrics == pytest.approx(found.metrics, rel=1e-4)


def test_a_private_run_over_tags_by_person_is_the_same_again_and_says_what_it_spent(
    tmp_path: Path, tagging: Callable[..., Any]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}
    privacy |= {"unit": "person", "per_unit": 3}
    config = tagging(privacy=privacy, batch_size=2, steps=2, strategy="fedsvd")

    version = service.launch(workspace, config)

    assert service.launch(workspace, config) == version
    recipe = workspace.store.version(version).recipe
    assert (recipe["privacy"]["unit"], recipe["privacy"]["per_unit"]) == ("person", 3)
    [epsilon, _] = service.lineage(workspace, version).epsilons
    assert epsilon.unit == "person"


def test_a_tokenizer_that_cannot_tell_words_is_refused_before_anything_starts(
    tmp_path: Path, tagging: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    known = models.tokenizer

    def slow(spec: Any) -> Any:
        found = known(spec)
        monkeypatch.setattr(type(found), "is_fast", False)
        return found

    monkeypatch.setattr(models, "tokenizer", slow)
    with pytest.raises(models.UnsupportedBase, match="use a base model with a fast tokenizer"):
        service.launch(workspace, tagging())
    assert workspace.ledger.runs() == []


def test_a_split_by_labels_is_refused_with_what_is_allowed(
    tmp_path: Path, notes: str, tagging: Callable[..., Any]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    simulate = {"data": notes, "by": "dirichlet", "parts": 2}

    with pytest.raises(BadSelection, match="has one for each word; use iid"):
        service.launch(workspace, tagging(clients={"simulate": simulate}))
