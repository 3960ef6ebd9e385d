"""Many clients, faulty ones among them, and workers that are killed at random, on local Ray.

``WEFT_CHAOS_CLIENTS`` (1000), ``WEFT_CHAOS_ROUNDS`` (10) and ``WEFT_CHAOS_SECONDS`` (300) make it
smaller.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import service
from orchestrator.backends.base import Failure
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config
from orchestrator.faults import is_faulty

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own processes
    pytest.mark.timeout(6 * 3600),
]

CLIENTS = int(os.environ.get("WEFT_CHAOS_CLIENTS", "1000"))
ROUNDS = int(os.environ.get("WEFT_CHAOS_ROUNDS", "10"))
SECONDS = float(os.environ.get("WEFT_CHAOS_SECONDS", "300"))
GIB = 1 << 30


class Without:
    """A backend that trains no faulty client: each is refused at once."""

    def __init__(self, inner: Any, is_out: Callable[[str], bool]) -> None:
        self.inner, self.is_out = inner, is_out

    def run(self, assignments: Any, *heard: Any) -> Iterator[Any]:
        out: list[Any] = []

        def others() -> Iterator[Any]:
            for assignment in assignments:
                if assignment is not None and self.is_out(assignment.client):
                    out.append(Failure(assignment.client, assignment.round, "left out"))
                    yield None
                else:
                    yield assignment

        for result in self.inner.run(others(), *heard):
            yield from out
            out.clear()
            yield result
        yield from out

    def close(self) -> None:
        self.inner.close()


def test_a_crowd_with_a_tenth_of_it_faulty_ends_where_the_honest_ones_alone_do(
    document, tmp_path
) -> None:
    rows = [{"text": f"where is number {i}", "label": "question"} for i in range(2 * CLIENTS)]
    rows[::2] = [{"text": f"bring me {i}", "label": "order"} for i in range(CLIENTS)]
    file = tmp_path / "crowd.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"data": f"jsonl:{file}", "by": "iid", "parts": CLIENTS, "public": True}
    base = document(
        strategy="fedavg",
        adapter={"name": "lora", "r": 2, "layers": [0], "target_modules": ["query", "value"]},
        clients={"simulate": data},
        rounds=ROUNDS,
        steps=1,
        batch_size=2,
        backend={"name": "ray", "workers": 2},
    )
    share = {"seed": 3, "clients": 0.1, "kinds": ["nan", "wrong-shape", "replay"]}
    probe = parse_config({**base, "faults": share}).faults
    assert probe is not None

    honest = service.open_workspace(tmp_path / "honest")
    ray = RayBackend(workers=2)
    try:
        wanted = service.launch(
            honest, parse_config(base), backend=Without(ray, lambda name: is_faulty(probe, name))
        )
    finally:
        ray.close()
    [record] = honest.ledger.runs()
    names = [p["name"] for p in honest.ledger.plan(record.id)["participants"]]
    lost = [name for name in names if is_faulty(probe, name)]
    kept = [name for name in names if name not in lost]
    assert len(lost) > 2

    # one that hangs holds a worker, and one that is lost holds the round, until the deadline; by
    # then one that crashes has cost six workers, one after another
    spent = [e.at for e in honest.ledger.events(record.id) if e.kind in ("round", "committed")]
    longest = max((b - a).total_seconds() for a, b in zip(spent[::2], spent[1::2], strict=True))
    at = [{"kind": "crash", "client": lost[0], "round": r + 1} for r in range(ROUNDS)]
    at += [
        {"kind": "hang", "client": lost[1], "round": ROUNDS},
        {"kind": "drop", "client": lost[2], "round": ROUNDS},
        {"kind": "slow", "client": kept[0], "round": 1},
        {"kind": "duplicate", "client": kept[1], "round": 1},
        {"kind": "clock-jump", "round": 1},
        {"kind": "corrupt-blob", "round": 1},
    ]
    faults = {**share, "at": at}
    settings = {"backend": {"name": "ray", "workers": 2}, "deadline_s": 180 + 4 * longest}
    memory: list[int] = []

    def observe(kind: str, data: Any) -> None:
        if kind == "committed":
            memory.append(sum(_resident(pid) for pid in [os.getpid(), *_descendants()]))

    workspace = service.open_workspace(tmp_path / "faulty")
    config = parse_config({**base, "faults": faults, **settings})
    assert service.launch(workspace, config, observe) == wanted
    [faulty] = workspace.ledger.runs()
    log = workspace.ledger.events(faulty.id)
    failed = {e.data["client"] for e in log if e.kind == "refused"}
    failed |= {client for e in log if e.kind == "closed" for client in e.data["missed"]}
    assert failed == set(lost)
    assert failed.isdisjoint(e.data["client"] for e in log if e.kind == "accepted")
    assert max(memory) < 24 * GIB


def test_a_run_ends_where_it_would_have_while_workers_are_killed_at_random(
    document, private_run, tmp_path
) -> None:
    whole = service.open_workspace(tmp_path / "whole")
    wanted = service.launch(whole, parse_config(private_run))
    over, killed = threading.Event(), []
    draw = random.Random(0)

    def kill_at_random() -> None:
        while not over.wait(10):
            if workers := _descendants("ray::Worker"):
                os.kill(victim := draw.choice(workers), signal.SIGKILL)
                killed.append(victim)

    backend = RayBackend(workers=2)
    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        end, number = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            number += 1
            workspace = service.open_workspace(tmp_path / f"home-{number}")
            config = parse_config(private_run)
            assert service.launch(workspace, config, backend=backend) == wanted
            workspace.close()
    finally:
        over.set()
        killer.join()
        backend.close()
    assert len(killed) >= int(SECONDS / 10) - 2


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


def _resident(pid: int) -> int:
    """Return a process's memory in bytes, what it shares with others counted in full."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
