"""A run that fails at any boundary of a durable write, and is resumed, ends as if it had not.

All boundaries, or the ``WEFT_CHAOS_POINTS`` of them that ``WEFT_CHAOS_SEED`` chooses.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from orchestrator.service import open_workspace
from orchestrator.upkeep import gc

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


@pytest.fixture
def reference(driver, private_run, left, tmp_path):
    """What the run leaves that nothing disturbs, and the boundaries that it passes."""
    driver(warm=private_run)
    whole = driver(home=str(tmp_path / "whole"), config=private_run)
    assert whole["error"] is None
    found = left(tmp_path / "whole")
    assert found.problems == ()
    assert len(found.spends) == 9
    return found, whole["boundaries"]


def test_a_run_killed_at_any_boundary_and_resumed_ends_at_the_same_version(
    driver, private_run, reference, left, understated, sampled, tmp_path
) -> None:
    wanted, boundaries = reference
    assert len(boundaries) >= 200
    problems = []
    for point in sampled(len(boundaries)):
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "config": private_run}
        where = f"{point} ({boundaries[point - 1]})"
        if driver(**job, fail="kill", at=point)["signal"] != 9:
            problems.append(f"{where}: it was not killed")
        problems += [f"{where}: {d} is not on the ledger" for d in understated(home)]
        answer = driver(**job)
        if answer["error"]:
            problems.append(f"{where}: it cannot be resumed: {answer['error']}")
        problems += [f"{where}: {p}" for p in _differences(left(home), wanted)]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


def test_a_run_killed_again_while_it_resumes_ends_at_the_same_version(
    driver, private_run, reference, left, understated, sampled, tmp_path
) -> None:
    wanted, boundaries = reference
    problems = []
    points = sampled(len(boundaries))
    for point in points[:: max(1, len(points) // 20)]:
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "config": private_run}
        deaths = 0
        # each process lives for `point` boundaries; what it did need not be done again
        while (answer := driver(**job, fail="kill", at=point + deaths))["signal"] == 9:
            deaths += 1
            problems += [f"{point}: {d} is not on the ledger" for d in understated(home)]
        if answer["error"]:
            problems.append(f"{point}: it cannot be resumed: {answer['error']}")
        problems += [f"{point}: {p}" for p in _differences(left(home), wanted)]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


def test_a_run_killed_at_any_boundary_of_its_reading_ends_at_the_same_version(
    driver, reading_run, left, sampled, tmp_path
) -> None:
    driver(warm=reading_run)
    whole = driver(home=str(tmp_path / "whole"), config=reading_run)
    assert whole["error"] is None
    wanted = left(tmp_path / "whole")
    assert wanted.problems == ()
    assert [
        len([k for k in wanted.kept if k.startswith(made)]) for made in ("round-1", "final-1")
    ] == [3, 3]
    problems = []
    for point in sampled(len(whole["boundaries"]), 4):
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "config": reading_run}
        where = f"{point} ({whole['boundaries'][point - 1]})"
        if driver(**job, fail="kill", at=point)["signal"] != 9:
            problems.append(f"{where}: it was not killed")
        answer = driver(**job)
        if answer["error"]:
            problems.append(f"{where}: it cannot be resumed: {answer['error']}")
        problems += [f"{where}: {p}" for p in _differences(left(home), wanted)]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


@pytest.mark.parametrize("fail", ["full", "outage"])
def test_a_run_that_meets_a_full_disk_or_a_lost_database_says_so_and_can_be_resumed(
    driver, private_run, reference, left, understated, sampled, tmp_path, fail
) -> None:
    """A full disk at a client is that client's failure: then the round goes on without it."""
    wanted, boundaries = reference
    problems = []
    for point in sampled(len(boundaries)):
        home = tmp_path / f"{fail}-{point}"
        job = {"home": str(home), "config": private_run}
        where = f"{point} ({boundaries[point - 1]})"
        failed = driver(**job, fail=fail, at=point)
        if failed["error"] is not None and not failed["expected"]:
            problems.append(f"{where}: a user sees a traceback: {failed['type']} {failed['error']}")
        problems += [f"{where}: {d} is not on the ledger" for d in understated(home)]
        answer = driver(**job)
        if answer["error"]:
            problems.append(f"{where}: it cannot be resumed: {answer['error']}")
        found = left(home)
        if found.kept.keys() == wanted.kept.keys():
            problems += [f"{where}: {p}" for p in _differences(found, wanted)]
        else:  # a client was refused: another version, and nothing wrong with it
            problems += [f"{where}: {p}" for p in found.problems]
            if len(found.spends) < len(wanted.spends):
                problems.append(f"{where}: {len(found.spends)} spends, {len(wanted.spends)} sent")
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])


def test_a_run_killed_while_it_ends_leaves_no_key_behind(
    driver, private_run, sampled, tmp_path
) -> None:
    """With keys of its own; what a killed process has left of them is gone after gc."""
    config = {**private_run, "privacy": {**private_run["privacy"], "insecure_seed": None}}
    driver(warm=config)
    whole = driver(home=str(tmp_path / "whole"), config=config)
    assert whole["error"] is None
    problems, killed = [], 0
    last = len(whole["boundaries"])
    points = [last - 25 + own for own in sampled(25, 4)]
    for point in points:
        home = tmp_path / f"killed-{point}"
        job = {"home": str(home), "config": config}
        where = f"{point} ({whole['boundaries'][point - 1]})"
        killed += driver(**job, fail="kill", at=point)["signal"] == 9
        answer = driver(**job)
        if answer["error"]:
            problems.append(f"{where}: it cannot be resumed: {answer['error']}")
        workspace = open_workspace(home)
        try:
            gc(workspace, delete=True)
            [run] = workspace.ledger.runs()
            rounds = {(row.client, row.round) for row in workspace.ledger.spends_of_run(run.id)}
            if run.status != "completed" or len(rounds) != 9:
                problems.append(f"{where}: {run.status}, {len(rounds)} spends")
        finally:
            workspace.close()
        left = [*home.glob("sites/*/key"), *home.glob("sites/*/.*"), *home.glob("closing/*")]
        problems += [f"{where}: {path} was left behind" for path in left]
        shutil.rmtree(home)
    assert not problems, "\n".join(problems[:40])
    assert killed >= 0.8 * len(points)  # with other keys a run may pass a boundary fewer


def _differences(found: Any, wanted: Any) -> list[str]:
    """Return what is wrong with a home, or other than it would be."""
    problems = list(found.problems)
    for name in ("statuses", "versions", "names", "blobs", "kept", "spends"):
        if getattr(found, name) != getattr(wanted, name):
            problems.append(f"{name}: {getattr(found, name)}, not {getattr(wanted, name)}")
    return problems
