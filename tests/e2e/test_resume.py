from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import service
from orchestrator.config import parse_config
from orchestrator.coordinator import Driving
from orchestrator.stream import parse_stream
from orchestrator.streaming import rows, run_stream, steps
from orchestrator.suite import matrix


@pytest.mark.parametrize(
    ("dp", "kind", "count"),
    [
        (False, "started", 1),  # before the first round
        (False, "accepted", 2),  # in the middle of a round
        (False, "closed", 2),  # what is aggregated is decided, and nothing more
        (True, "round", 2),  # before anything of it is spent
        (True, "assigned", 2),  # after the spend is on the ledger, before anyone trains
        (True, "accepted", 5),
        (True, "committed", 2),
    ],
)
def test_a_run_killed_and_resumed_ends_at_the_same_version(
    tmp_path: Path,
    document: Callable[..., dict[str, Any]],
    killed: Callable[..., None],
    dp: bool,
    kind: str,
    count: int,
) -> None:
    config = document(dp, clients=document()["clients"])
    whole = service.open_workspace(tmp_path / "whole")
    wanted = service.launch(whole, parse_config(config))

    killed(tmp_path / "killed", config, kind, count)
    broken = service.open_workspace(tmp_path / "killed")
    [record] = broken.ledger.runs()
    assert record.status == "running"
    assert service.resume(broken, record.id) == wanted
    assert broken.ledger.run(record.id).status == "completed"
    assert len(broken.ledger.spends_of_run(record.id)) == (9 if dp else 0)


def test_a_second_process_is_told_that_a_run_is_driven(
    tmp_path: Path, document: Callable[..., dict[str, Any]], killed: Callable[..., None]
) -> None:
    home = tmp_path / "home"
    killed(home, document(), "round", 1)
    workspace = service.open_workspace(home)
    [record] = workspace.ledger.runs()
    workspace.ledger.queue.release(record.id, record.token, "its driver is dead")
    workspace.ledger.queue.claim("elsewhere:17:abc:123", 60, run=record.id)
    with pytest.raises(service.RunBusy, match=r"is driving run \w+ \(elsewhere:17:abc:123\) until"):
        service.resume(workspace, record.id)
    assert workspace.ledger.run(record.id).owner == "elsewhere:17:abc:123"


def test_a_run_of_relative_paths_is_resumed_from_another_folder(
    tmp_path: Path,
    document: Callable[..., dict[str, Any]],
    killed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = document(evaluate={"data": "jsonl:rows.jsonl"}, rounds=2)
    config["clients"]["simulate"]["data"] = "jsonl:rows.jsonl"
    monkeypatch.chdir(tmp_path)
    killed(tmp_path / "home", config, "committed", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    workspace = service.open_workspace(tmp_path / "home")
    version = service.resume(workspace, "task-1")
    assert "accuracy" in workspace.store.version(version).metrics


def test_a_stream_killed_again_and_again_ends_at_the_same_versions(
    tmp_path: Path, document: Callable[..., dict[str, Any]], killed: Callable[..., None]
) -> None:
    base = document(strategy="fedavg", rounds=1, steps=1)
    data = base["clients"]["simulate"]["data"]
    del base["name"]
    tasks = [{"name": name, "evaluate": data} for name in ("first", "second")]
    method = {"start": "continue", "regularizers": ["ewc"], "merge": "svd"}
    stream = {"name": "notes", "base": base, "method": method, "tasks": tasks}

    def run(home: Path) -> tuple[list[tuple[str | None, str | None]], Any]:
        workspace, made = service.open_workspace(home), parse_stream(stream)
        done = run_stream(workspace, made, Driving(), lambda run: lambda kind, data: None)
        assert workspace.store.version("notes:v2").id == done[1].result
        assert [record.status for record in workspace.ledger.runs()] == ["completed"] * 2
        scores = matrix(workspace, made, rows(workspace, made, done))
        return [(step.version, step.result) for step in done], scores

    for kind, count in (
        ("accepted", 2),  # in the middle of a round
        ("Ledger.create_run", 1),  # between a task's end and the queueing of the next
        ("AdapterStore.record_metrics", 2),  # while versions are scored
        ("reading", 1),  # when the task is learned and nothing of it is remembered
        ("AdapterStore.name", 2),  # when the merge is committed, before anything names it
    ):
        killed(tmp_path / "killed", stream, kind, count)
    broken = service.open_workspace(tmp_path / "killed")
    steps_then = steps(broken, parse_stream(stream))
    assert len({steps_then[1].version, steps_then[1].result, None}) == 3  # it was merged
    assert len(broken.store.versions(name="notes")) == 1  # and not named
    broken.close()
    assert run(tmp_path / "killed") == run(tmp_path / "whole")
