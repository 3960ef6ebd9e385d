"""Many clients, faulty ones among them, and workers that are killed at random, on local Ray.

``WEFT_CHAOS_CLIENTS`` (1000), ``WEFT_CHAOS_ROUNDS`` (10) and ``WEFT_CHAOS_SECONDS`` (300, one kill
in ten; longer where workers take longer to start) make it smaller.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from _figures import drift
from _memory import Meter

from clients.worker import perform
from orchestrator import service
from orchestrator.backends.base import Failure
from orchestrator.backends.ray import RayBackend
from orchestrator.config import RunConfig, parse_config
from orchestrator.faults import FaultAt, Faults, client_fault, is_faulty
from orchestrator.faulty import FaultyPerform
from orchestrator.workspace import Workspace

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own processes
    pytest.mark.timeout(6 * 3600),
]

CLIENTS = int(os.environ.get("WEFT_CHAOS_CLIENTS", "1000"))
ROUNDS = int(os.environ.get("WEFT_CHAOS_ROUNDS", "10"))
SECONDS = float(os.environ.get("WEFT_CHAOS_SECONDS", "300"))


LOSING = frozenset({"crash", "hang", "nan", "wrong-shape", "replay", "drop"})
"""What costs a client its update; who is only slow, or answers twice, takes part."""


class Without:
    """A backend without the updates that faults cost: each of those clients is refused at once."""

    def __init__(self, inner: Any, faults: Faults) -> None:
        self.inner, self.faults = inner, faults

    def run(self, assignments: Any, *heard: Any) -> Iterator[Any]:
        out: list[Any] = []

        def others() -> Iterator[Any]:
            for assignment in assignments:
                if assignment is not None and self._is_out(assignment):
                    out.append(Failure(assignment.client, assignment.round, "left out"))
                else:
                    yield assignment

        for result in self.inner.run(others(), *heard):
            yield from out
            out.clear()
            yield result
        yield from out

    def close(self) -> None:
        self.inner.close()

    def _is_out(self, assignment: Any) -> bool:
        fault = client_fault(self.faults, assignment.round, assignment.client)
        return assignment.action == "train" and fault in LOSING


class Watched:
    """Measures each round of a run, and forgives who failed in it: the next asks all again."""

    def __init__(self, workspace: Workspace, meter: Meter) -> None:
        self.ledger, self.meter = workspace.ledger, meter
        self.lost: dict[int, set[str]] = defaultdict(set)
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.megabytes: list[float] = []
        self._failed: set[str] = set()
        self._since = time.monotonic()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        failed = [data["client"]] if kind == "refused" else data.get("missed", ())
        if kind in ("refused", "closed"):
            self.lost[data["round"]].update(failed)
            self._failed.update(failed)
        if kind == "committed":
            self._measure()
            for client in sorted(self._failed):
                self.ledger.record(self.ledger.runs(1)[0].id, "forgiven", {"client": client})
            self._failed.clear()

    def _measure(self) -> None:
        processor, megabytes = self.meter.lap()
        now = time.monotonic()
        self.seconds.append(now - self._since)
        self.processor.append(processor)
        self.megabytes.append(megabytes)
        self._since = now

    def figures(self) -> list[str]:
        """Return a line for each thing that was measured."""
        rows = {"s": self.seconds, "s of processor": self.processor, "MB": self.megabytes}
        return [
            f"{unit} a round: {', '.join(f'{v:.1f}' for v in values)}; "
            f"drift of rounds 2 on {drift(values[1:] or values):+.1%}"
            for unit, values in rows.items()
        ]


def test_a_crowd_with_a_tenth_of_it_faulty_ends_where_the_honest_ones_alone_do(
    document, tmp_path, capsys, request
) -> None:
    """Every fault there is happens: some to a tenth in each round, the costly ones to a few."""
    rows = [
        {"text": f"{text} {i}", "label": label}
        for i in range(CLIENTS)
        for text, label in (("bring me", "order"), ("where is number", "question"))
    ]
    file = tmp_path / "crowd.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"data": f"jsonl:{file}", "by": "iid", "parts": CLIENTS, "public": True}
    base = document(
        strategy={"name": "fedavg", "weighting": "uniform"},
        adapter={"name": "lora", "r": 2, "layers": [0], "target_modules": ["query", "value"]},
        clients={"simulate": data},
        rounds=ROUNDS,
        steps=1,
        batch_size=2,
        retries=0,
        backend={"name": "ray", "workers": 2},
    )
    share: dict[str, Any] = {
        "seed": 3,
        "clients": 0.1,
        "kinds": ["nan", "wrong-shape", "replay", "slow", "duplicate"],
        "delay_s": 0.2,
    }
    names = [f"part-{n}" for n in range(CLIENTS)]
    probe = Faults(**share)
    faulty = [name for name in names if is_faulty(probe, name)]
    crashing, hanging, losing = faulty[:3]
    waiting = sorted({min(2, ROUNDS), max(1, ROUNDS - 1)})  # rounds that last until the deadline
    hosts = ["full-disk", "clock-jump", "database-outage", "corrupt-blob"]
    at = [{"kind": "crash", "client": crashing, "round": r + 1} for r in range(ROUNDS)]
    at += [{"kind": "hang", "client": hanging, "round": round_} for round_ in waiting]
    at += [{"kind": "drop", "client": losing, "round": round_} for round_ in waiting]
    at += [{"kind": kind, "round": 1 + n * ROUNDS // 5} for n, kind in enumerate(hosts)]
    faults = Faults(**share, at=tuple(FaultAt(**one) for one in at))

    honest = service.open_workspace(tmp_path / "honest")
    ray = RayBackend(workers=2, perform=FaultyPerform(faults, perform), grace_s=2)
    request.addfinalizer(ray.close)
    with Meter(os.getpid()) as meter:
        alone = Watched(honest, meter)
        wanted = service.launch(honest, parse_config(base), alone, Without(ray, faults))

    # one that hangs holds a worker, and one that is lost holds the round, until the deadline
    deadline_s = 60 + 3 * max(alone.seconds)
    section = {**share, "at": at}
    config = parse_config({**base, "faults": section, "deadline_s": deadline_s})
    workspace = service.open_workspace(tmp_path / "faulty")
    with Meter(os.getpid()) as meter:
        seen = Watched(workspace, meter)
        version, stops = driven(workspace, config, seen, ray)

    with capsys.disabled():
        sys.stdout.write(f"\n{CLIENTS} clients, {ROUNDS} rounds, {len(faulty)} faulty in each\n")
        for title, run in (("the honest alone", alone), ("all", seen)):
            sys.stdout.write("".join(f"  {title}: {line}\n" for line in run.figures()))
        sys.stdout.write(f"  the honest alone end at {wanted}, all at {version}\n")
    assert version == wanted
    assert len(stops) == 2  # the full disk and the outage, each once
    for round_ in range(1, ROUNDS + 1):
        lost = {name for name in faulty if client_fault(faults, round_, name) in LOSING}
        assert seen.lost[round_] == alone.lost[round_] == lost
    assert max(seen.megabytes) < 24_000


def driven(
    workspace: Workspace, config: RunConfig, observe: Watched, backend: RayBackend
) -> tuple[str, list[str]]:
    """Run to the end, resuming after what stops the coordinator; return also what that said."""
    stops: list[str] = []
    try:
        return service.launch(workspace, config, observe, backend), stops
    except OSError as error:
        stops.append(str(error))
    while len(stops) < 5:
        try:
            return service.resume(workspace, config.name, observe, backend), stops
        except OSError as error:
            stops.append(str(error))
    raise AssertionError(f"it was stopped again and again: {stops}")


def test_a_run_ends_where_it_would_have_while_workers_are_killed_at_random(
    private_run, tmp_path, capsys
) -> None:
    # on a busy machine a model loads for longer than a worker may live here
    config = parse_config({**private_run, "retries": 20})
    whole = service.open_workspace(tmp_path / "whole")
    wanted = service.launch(whole, config)
    over, killed, enough = threading.Event(), [], int(SECONDS / 10)
    draw = random.Random(0)

    def kill_at_random() -> None:
        while len(killed) < enough and not over.wait(10):
            while not (workers := _descendants("ray::Worker")) and not over.wait(0.2):
                pass  # new ones are starting
            if workers:
                os.kill(victim := draw.choice(workers), signal.SIGKILL)
                killed.append(victim)

    backend = RayBackend(workers=2)
    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        number = rounds = 0
        while killer.is_alive():
            number += 1
            workspace = service.open_workspace(tmp_path / f"home-{number}")
            assert service.launch(workspace, config, backend=backend) == wanted
            rounds += workspace.ledger.runs(1)[0].round
            workspace.close()
    finally:
        over.set()
        killer.join()
        backend.close()
    with capsys.disabled():
        sys.stdout.write(f"\n{len(killed)} kills; {number} runs, {rounds} rounds, each completed\n")
    assert len(killed) == enough


def _descendants(title: str = "") -> list[int]:
    """Return the processes that descend from this one and whose command line begins so."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            titles[int(folder.name)] = (folder / "cmdline").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    found = []
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() != pid and titles.get(pid, "").startswith(title):
            found.append(pid)
    return found
