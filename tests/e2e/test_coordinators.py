"""Coordinators as processes: killed or stopped at any point, they lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import service
from orchestrator.config import parse_config

SERVE_AND_DIE = str(Path(__file__).with_name("serve_and_die.py"))
COORDINATOR = [sys.executable, "-m", "orchestrator.cli", "coordinator"]


def environment(home: Path) -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WEFT_")}
    return {**kept, "WEFT_HOME": str(home)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("accepted", 5), ("spent", 2), ("committed", 3)])
def test_what_a_killed_coordinator_drove_another_ends_at_the_same_versions(
    tmp_path: Path, document: Callable[..., dict[str, Any]], kind: str, count: int
) -> None:
    configs = [parse_config(document(True, seed=seed, name=f"task-{seed}")) for seed in range(3)]
    whole = service.open_workspace(tmp_path / "whole")
    wanted = [service.launch(whole, config) for config in configs]

    home = tmp_path / "home"
    workspace = service.open_workspace(home)
    runs = [service.submit(workspace, config) for config in configs]
    doomed = [sys.executable, SERVE_AND_DIE, str(home), kind, str(count), "5"]
    with subprocess.Popen(doomed, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == runs[0]
        done = subprocess.run(
            [*COORDINATOR, "--until-idle", "--lease-s", "60"],
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert first.wait(100) == -signal.SIGKILL
    assert done.returncode == 0, done.stderr
    records = [workspace.ledger.run(run) for run in runs]
    assert [record.status for record in records] == ["completed"] * 3, done.stderr
    assert [record.version for record in records] == wanted
    assert [record.token for record in records] == [2, 1, 1]
    for run in runs:
        assert len(workspace.ledger.spends_of_run(run)) == 9
        committed = [e.data["round"] for e in workspace.ledger.events(run) if e.kind == "committed"]
        assert committed == [1, 2, 3]


def test_a_coordinator_that_is_told_to_stop_leaves_its_run_to_others(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    home = tmp_path / "home"
    workspace = service.open_workspace(home)
    run = service.submit(workspace, parse_config(document(rounds=1000)))
    with subprocess.Popen(
        COORDINATOR, env=environment(home), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"run {run} of task-1"
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 0
    assert said.endswith("drove 1 runs\n")
    record = workspace.ledger.run(run)
    assert (record.status, record.owner) == ("queued", None)
    assert workspace.ledger.events(run)[-1].kind == "released"
    assert not workspace.ledger.queue.is_driven(run)
