"""What is left after a failure: asked of a process that fails on demand, read from the disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clients.wire import digest, unpack
from orchestrator.bases import base_of
from orchestrator.service import open_workspace
from orchestrator.upkeep import fsck
from orchestrator.workspace import Workspace
from storage.blobs import digest_of
from storage.ledger import RunRecord
from storage.updates import UpdateGone

Spends = frozenset[tuple[str, int, str, str]]


@dataclass(frozen=True)
class Driver:
    """Asks ``driver.py`` to run federations that fail; see there."""

    process: subprocess.Popen[str]

    def __call__(self, **job: Any) -> dict[str, Any]:
        """Do one job and return its answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the driver is gone; what it printed last says why"
        found: dict[str, Any] = json.loads(answer)
        return found


@dataclass(frozen=True)
class Left:
    """What a run has left on disk and database: equal for runs that went alike.

    Attributes:
        statuses: of the runs, by name.
        versions: ids of all versions; each was read and checked against its content.
        names: what names them.
        blobs: digests of all blobs; each was hashed again.
        kept: digest of each client's accepted bytes, by round and by the labels that it learned.
        spends: (client, round, assignment, parameters) of every privacy event.
    """

    statuses: Mapping[str, str]
    versions: frozenset[str]
    names: Mapping[str, str]
    blobs: frozenset[str]
    kept: Mapping[str, str]
    spends: Spends
    problems: Sequence[str] = field(default=())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """A process that has everything imported and forks a child for each job."""
    script = Path(__file__).with_name("driver.py")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield Driver(process)
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


@pytest.fixture
def private_run(document: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A run of three clients, three rounds and DP, as small as one can be."""
    return document(
        adapter={"name": "lora", "r": 2, "layers": [0], "target_modules": ["query", "value"]},
        privacy={"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7},
        steps=1,
        batch_size=4,
        retention="all",
    )


@pytest.fixture
def reading_run(document: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A run of three clients and one round, whose result remembers what they read of their data."""
    return document(
        adapter={"name": "lora", "r": 2, "layers": [0], "target_modules": ["query", "value"]},
        strategy="fedavg",
        regularizers=["ewc", "si"],
        rounds=1,
        steps=1,
        batch_size=4,
        retention="all",
    )


@pytest.fixture(scope="session")
def sampled() -> Callable[..., list[int]]:
    """Chooses which of ``n`` points to fail at: all, or ``WEFT_CHAOS_POINTS`` of them by seed.

    A ``part`` of 4 is for what is beside the point: a quarter of them then, but all if all.
    """
    wanted = int(os.environ.get("WEFT_CHAOS_POINTS", "0"))
    seed = os.environ.get("WEFT_CHAOS_SEED", "0")

    def choose(count: int, part: int = 1) -> list[int]:
        points = range(1, count + 1)
        few = -(-wanted // part)
        if not 0 < few < count:
            return list(points)
        return sorted(random.Random(seed).sample(points, few))

    return choose


@pytest.fixture(scope="session")
def left() -> Callable[[Path], Left]:
    """Reads all that a run has left in a home, and checks it: ``problems`` says what is wrong."""

    def read(home: Path) -> Left:
        workspace = open_workspace(home)
        try:
            return _left(workspace)
        finally:
            workspace.close()

    return read


@pytest.fixture(scope="session")
def understated() -> Callable[[Path], list[str]]:
    """Names the updates that exist in a home, noised and stored, and are not on its ledger."""

    def find(home: Path) -> list[str]:
        made = {p.name.removeprefix("update-") for p in home.glob("sites/*/update-*")}
        if not made:
            return []
        workspace = open_workspace(home)
        try:
            return sorted(made - {row[2] for row in _spends(workspace)})
        finally:
            workspace.close()

    return find


def _left(workspace: Workspace) -> Left:
    store, home = workspace.store, workspace.home
    records = workspace.ledger.runs()
    versions = {v.id: v for v in store.versions(limit=1000)}  # reading checks ids against content
    problems = [problem.text for problem in fsck(workspace).store.problems]
    for version in versions.values():
        try:
            base_of(workspace, version)
        except Exception as error:
            problems.append(f"version {version.id} has no base: {error!r}")
    problems += [p for record in records for p in _log_problems(workspace, record)]
    recorded = {leaf["digest"] for v in versions.values() for leaf in v.recipe["updates"]}
    kept = {}
    for version in versions.values():
        for leaf in version.recipe["updates"]:
            with suppress(UpdateGone):
                data = store.updates.read(leaf["digest"])
                unpack(data)
                made = f"{version.recipe['kind']}-{version.recipe['round']}"
                learned = ",".join(version.recipe.get("task_labels", ()))  # of which task
                kept[f"{made}/{leaf['client']}/{learned}"] = digest(data)
    problems += [f"no kept update hashes to {d}" for d in recorded - set(kept.values())]
    problems += [f"{path} was left behind" for path in home.glob("runs/*/round-*/*.safetensors")]
    return Left(
        statuses={record.name: record.status for record in records},
        versions=frozenset(versions),
        names={name: v.id for v in versions.values() for name in v.names},
        blobs=frozenset(
            d for e in workspace.blobs.place.entries() if (d := digest_of(e.name)) is not None
        ),
        kept=kept,
        spends=_spends(workspace),
        problems=tuple(problems),
    )


def _log_problems(workspace: Workspace, record: RunRecord) -> list[str]:
    events = workspace.ledger.events(record.id)
    problems = []
    committed = [e.data["round"] for e in events if e.kind == "committed"]
    if record.status == "completed" and sorted(set(committed)) != list(range(1, record.rounds + 1)):
        problems.append(f"the log of {record.id} commits rounds {committed} of {record.rounds}")
    if record.status == "completed" and "completed" not in {e.kind for e in events}:
        problems.append(f"the log of {record.id} does not say that it completed")
    return problems


def _spends(workspace: Workspace) -> Spends:
    return frozenset(
        (row.client, row.round, row.assignment, json.dumps(row.parameters, sort_keys=True))
        for record in workspace.ledger.runs()
        for row in workspace.ledger.spends_of_run(record.id)
    )
