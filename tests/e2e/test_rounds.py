"""What time decided on many workers is replayed on one, to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import service
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config

SETTINGS: dict[str, dict[str, Any]] = {
    "asynchronous": {"asynchronous": {"buffer": 2, "concurrency": 3}},
    "late": {"cohort": {"size": 1, "over_provision": 1.0}, "late": "keep", "quorum": 1},
}


@pytest.mark.ray
def test_a_run_whose_workers_raced_is_replayed_from_its_log(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    """The home as it was at each decision goes on inline, and makes of it what Ray made."""
    backend = RayBackend(workers=2)
    try:
        for name, settings in SETTINGS.items():
            home = tmp_path / name
            copies: list[tuple[Path, int]] = []

            def observe(
                kind: str,
                data: Mapping[str, Any],
                home: Path = home,
                copies: list[tuple[Path, int]] = copies,
            ) -> None:
                if kind == "closed":
                    copy = home.with_name(f"{home.name}-{data['round']}")
                    shutil.copytree(home, copy)
                    copies.append((copy, data["round"]))

            workspace = service.open_workspace(home)
            config = parse_config(document(dp=True, strategy="ffa-lora", **settings))
            service.launch(workspace, config, observe, backend)
            wanted = _committed(workspace)
            assert [round_ for _, round_ in copies] == [1, 2, 3]

            for copy, round_ in copies:
                there = service.open_workspace(copy)
                driven = there.ledger.run("task-1")  # as if its driver had died
                there.ledger.queue.release(driven.id, driven.token, "this is a copy")
                service.resume(there, "task-1")
                assert _committed(there)[round_] == wanted[round_], (name, round_)
                there.close()
    finally:
        backend.close()


def _events(workspace: service.Workspace) -> Any:
    [record] = workspace.ledger.runs()
    return workspace.ledger.events(record.id)


def _committed(workspace: service.Workspace) -> dict[int, str]:
    found = [e.data for e in _events(workspace) if e.kind == "committed"]
    return {data["round"]: data["version"] for data in found}
