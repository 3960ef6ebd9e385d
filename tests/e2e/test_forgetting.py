"""Two tasks, one after the other: what the first one's clients remember holds the second back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clients.assignment import DataSpec
from orchestrator import service
from orchestrator.config import parse_config

WEIGHTS = {"ewc": 1e6, "mas": 100.0, "si": 100.0}
IMPORTANCE = {"ewc": "ewc/fisher/", "mas": "mas/importance/", "si": "si/importance/"}


def test_a_second_task_forgets_less_with_a_memory_of_the_first_and_its_weight_alone(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    workspace = service.open_workspace(tmp_path / "home")
    common: dict[str, Any] = {"strategy": "fedavg", "rounds": 2, "steps": 8}

    def task(number: int, labels: list[str], **changes: Any) -> str:
        config = document(name=f"task-{number}", task_labels=labels, **common, **changes)
        return service.launch(workspace, parse_config(config))

    first = task(1, ["question", "order"], regularizers=[*WEIGHTS])
    memory, start = workspace.store.memory(first), workspace.store.tensors(first)
    then: dict[str, Any] = {"start": "continue", "start_from": first}
    new = ["greeting", "report"]
    plain = task(2, new, **then)
    free = task(2, new, **then, regularizers=[{"name": n, "weight": 0.0} for n in WEIGHTS])
    without = workspace.store.tensors(plain)
    assert all(torch.equal(t, without[n]) for n, t in workspace.store.tensors(free).items())

    def moved(ref: str, name: str) -> float:
        """Return how far a version is from the first task's, by what mattered to that."""
        now, prefix = workspace.store.tensors(ref), IMPORTANCE[name]
        named = {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}
        assert named
        return sum(float((v * (now[n] - start[n]).square()).sum()) for n, v in named.items())

    old = DataSpec(document()["clients"]["simulate"]["data"], labels=("question", "order"))
    forgotten = service.evaluate(workspace, plain, old).metrics["loss"]
    for name, weight in WEIGHTS.items():
        held = task(2, new, **then, regularizers=[{"name": name, "weight": weight}])
        assert moved(held, name) < moved(plain, name) / 4
        assert service.evaluate(workspace, held, old).metrics["loss"] < forgotten - 0.02
