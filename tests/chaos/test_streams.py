"""A stream that is killed anywhere and run again ends as one that nothing disturbed.

In the middle of a round, between a task's end and the queueing of the next, while its versions are
scored and while they are merged. All boundaries, or the ``WEFT_CHAOS_POINTS`` of them that
``WEFT_CHAOS_SEED`` chooses.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service import open_workspace
from orchestrator.stream import parse_stream
from orchestrator.streaming import recorded, rows, steps
from orchestrator.suite import matrix

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")
TASKS = {"pets": ["cat", "dog"], "parts": ["model", "rank"]}


@dataclass(frozen=True)
class Whole:
    """A stream's file, what it leaves undisturbed, and the boundaries that it passes.

    Attributes:
        document: the file's content.
        left: what the runs have left, as of any run.
        scores: of each version on each task; a row each.
        examples: bytes of what clients keep, by path.
        boundaries: in order.
    """

    document: dict[str, Any]
    left: Any
    scores: Any
    examples: dict[str, bytes]
    boundaries: list[str]


@pytest.fixture(scope="module", params=["memories", "merges"])
def whole(request, driver, left, tiny_encoder, tmp_path_factory) -> Whole:
    """A stream of two tasks of three clients: one that remembers and rehearses, one that merges."""
    folder = tmp_path_factory.mktemp(request.param)
    own = {
        "memories": {"start": "continue", "regularizers": ["ewc", "si", "replay"]},
        "merges": {
            "start": "isolated",
            "strategy": "ffa-lora",
            "merge": "linear",
            "merge_weight": "mean",
        },
    }
    routed = request.param == "merges"
    document = {
        "name": "notes",
        "method": own[request.param],
        "base": {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "strategy": "fedavg",
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "clients": {"simulate": {"by": "iid", "parts": 2, "public": True}},
            "rounds": 1,
            "steps": 1,
            "batch_size": 4,
            "retention": "all",
            "backend": "inline",
        },
        "tasks": [_task(folder, name, labels, routed) for name, labels in TASKS.items()],
    }
    driver(warm={**parse_stream(document).stages[-1].document})
    home = folder / "whole"
    done = driver(home=str(home), stream=document)
    assert done["error"] is None
    found = left(home)
    assert found.problems == ()
    assert len(done["boundaries"]) >= 200
    return Whole(document, found, _scores(home), _examples(home), done["boundaries"])


def _task(folder: Path, name: str, labels: list[str], routed: bool) -> dict[str, Any]:
    lines = [f"{labels[i % 2]} {WORDS[i % 9]} {WORDS[(i + 1) % 9]}" for i in range(12)]
    written = [json.dumps({"text": line, "label": line.split()[0]}) for line in lines]
    (folder / f"{name}.jsonl").write_text("\n".join(written))
    data = f"jsonl:{folder / name}.jsonl"
    router = {"router": {"data": data, "public": True}} if routed else {}
    return {"name": name, "data": data, "labels": labels, "evaluate": data, **router}


def test_a_stream_killed_at_any_boundary_and_run_again_ends_at_the_same_versions(
    driver, whole, left, sampled, tmp_path
) -> None:
    problems = []
    for point in sampled(len(whole.boundaries), 8):
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "stream": whole.document}
        where = f"{point} ({whole.boundaries[point - 1]})"
        if driver(**job, fail="kill", at=point)["signal"] != 9:
            problems.append(f"{where}: it was not killed")
        problems += [f"{where}: {p}" for p in _differences(driver(**job), home, left, whole)]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


def test_a_stream_killed_again_while_it_goes_on_ends_at_the_same_versions(
    driver, whole, left, sampled, tmp_path
) -> None:
    problems = []
    points = sampled(len(whole.boundaries), 8)
    for point in points[:: max(1, len(points) // 10)]:
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "stream": whole.document}
        deaths = 0
        # each process lives for `point` boundaries; what it did need not be done again
        while (answer := driver(**job, fail="kill", at=point + deaths))["signal"] == 9:
            deaths += 1
        problems += [f"{point}: {p}" for p in _differences(answer, home, left, whole)]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


def _differences(answer: Any, home: Path, left: Any, whole: Whole) -> list[str]:
    """Return what is wrong with a home, or other than it would be."""
    if answer["error"]:
        return [f"it does not go on: {answer['error']}"]
    found, problems = left(home), []
    for name in ("statuses", "versions", "names", "blobs", "kept", "spends"):
        if getattr(found, name) != getattr(whole.left, name):
            problems.append(f"{name}: {getattr(found, name)}, not {getattr(whole.left, name)}")
    if _scores(home) != whole.scores:
        problems.append(f"scores: {_scores(home)}, not {whole.scores}")
    if _examples(home) != whole.examples:
        problems.append(f"examples: {sorted(_examples(home))}, not {sorted(whole.examples)}")
    return [*found.problems, *problems]


def _scores(home: Path) -> list[Any]:
    workspace = open_workspace(home)
    try:
        stream = recorded(workspace, "notes")
        lines = rows(workspace, stream, steps(workspace, stream))
        routed = [workspace.store.version(line.version).metrics for line in lines]
        return [matrix(workspace, stream, lines).rows, routed]
    finally:
        workspace.close()


def _examples(home: Path) -> dict[str, bytes]:
    kept = sorted((home / "sites").glob("examples/**/*"))
    return {str(p.relative_to(home)): p.read_bytes() for p in kept if p.is_file()}
