"""Rounds over real sites of this machine: what a message costs besides its training, and a round.

A SuperLink as ``weft superlink start`` runs it, and sites as ``weft node start`` does, each with
its SuperNode: processes of their own, with keys, over TLS on loopback. A client's training is one
step on one example of a tiny model, and what it takes at the site is taken off.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _figures import Figure
from _memory import family, processor_seconds
from scale import small_model
from typer.testing import CliRunner

from clients.flower_program import bound
from clients.flower_runtime import RuntimeGone
from clients.orders import Terms
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.mixed import MixedBackend
from orchestrator.backends.sites import Calling, SitesBackend
from orchestrator.backends.sites_state import FILE
from orchestrator.cli import app
from orchestrator.config import parse_config
from orchestrator.superlink_home import superlink_of
from orchestrator.workspace import Workspace, open_workspace

MESSAGE_S, ROUND_S, LOADS = 0.5, 8.0, 1
LABELS = ("cat", "dog")
UP_WITHIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it.

    Attributes:
        sites: that take part in each round.
        rounds: that are measured, after the first.
    """

    sites: int
    rounds: int


@dataclass(slots=True)
class Told:
    """What a run's rounds took, as it went.

    Attributes:
        asked: when a round's assignments were handed out, by round.
        closed: when its version was committed, by round.
        overheads: seconds from the one until an update was accepted, less the site's own work.
        loads: base models that a site's process has loaded, by node.
        processor: seconds of it that all processes had used when a round was closed.
    """

    asked: dict[int, float] = field(default_factory=dict)
    closed: dict[int, float] = field(default_factory=dict)
    overheads: dict[int, list[float]] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    processor: list[float] = field(default_factory=list)
    _own: dict[str, float] = field(default_factory=dict)

    def learn(self, node: str, about: Mapping[str, Any]) -> None:
        """Take what a site says with its answer."""
        self.loads[node], self._own[node] = about["loads"], about["seconds"]

    def observe(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take what a run says."""
        now, round_ = time.perf_counter(), data.get("round", 0)
        if kind == "assigned":
            self.asked.setdefault(round_, now)
        elif kind == "accepted":
            own = self._own[data["client"]]
            self.overheads.setdefault(round_, []).append(now - self.asked[round_] - own)
        elif kind == "committed":
            self.closed[round_] = now
            self.processor.append(processor_seconds(family(os.getpid())))
        elif kind in ("refused", "retried", "failed"):
            raise RuntimeError(f"a benchmark's round must not fail: {data}")


def measure(size: Size) -> list[Figure]:
    """Return the figures of rounds over sites."""
    with tempfile.TemporaryDirectory() as folder, _federation(Path(folder), size) as workspace:
        told = _run(workspace, Path(folder), size)
    later = [n for n in sorted(told.closed) if n > min(told.closed)]
    overheads = [s for n in later for s in told.overheads[n]]
    rounds = [told.closed[n] - told.asked[n] for n in later]
    where = f"an update of 6 KB, rounds 2 to {size.rounds + 1}"
    name = f"overhead.{size.sites}-sites"

    def figure(row: str, values: Sequence[float], goal: float) -> Figure:
        setting = f"{where}; {min(values):.2f}..{max(values):.2f}"
        return Figure(f"{name}.{row}", statistics.median(values), "s", goal, "lower", "", setting)

    most = max(told.loads.values())
    loads = Figure(f"{name}.loads", most, "models", LOADS, "lower", "", "of any site's process")
    used = (told.processor[-1] - told.processor[0]) / len(overheads)
    each = "of all processes, a client and round, with its training"
    processor = Figure(f"{name}.processor", used, "s", None, "lower", "", each)
    times = [figure("message", overheads, MESSAGE_S), figure("round", rounds, ROUND_S)]
    return [*times, processor, loads]


def _run(workspace: Workspace, folder: Path, size: Size) -> Told:
    """Drive a run to its end; return what its rounds took."""
    told = Told()

    def node_of(client: str) -> tuple[str, str]:
        node = workspace.ledger.nodes.of_clients([client])[client]
        return node.name, node.public_key

    flwr = ".".join(version("flwr").split(".")[:2])
    terms = Terms("fedavg", "benchmark", version("weft"), flwr, 0.0)
    calling = Calling(terms, 300.0, node_of, told.learn)
    document = {
        "name": "benchmark",
        "model": {"id": str(folder / "model"), "max_length": 16},
        "labels": list(LABELS),
        "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
        "strategy": "fedavg",
        "steps": 1,
        "batch_size": 1,
        "rounds": size.rounds + 1,
        "clients": {"select": {}},
        "quorum": size.sites,
        "retries": 0,
        "backend": "superlink",
    }
    sites = SitesBackend(superlink_of(workspace.home), calling, folder / FILE)
    backend = MixedBackend(InlineBackend(), sites)
    try:
        service.launch(workspace, parse_config(document), told.observe, backend)
    finally:
        backend.close()
    return told


@contextmanager
def _federation(folder: Path, size: Size) -> Iterator[Workspace]:
    """Run a SuperLink and sites; yields the coordinator's workspace when all are there."""
    home, port, model = folder / "home", _free_port(), small_model(folder / "model")
    names = [f"site-{n}" for n in range(size.sites)]
    with ExitStack() as stack:
        log = folder / "superlink.log"
        start = ["superlink", "start", "--port", str(port)]
        stack.enter_context(_running(start, log, WEFT_HOME=str(home)))
        authority = home / "superlink" / "tls" / "ca.crt"
        _until(authority.exists, log)
        workspace = open_workspace(home)
        stack.callback(workspace.close)
        for name in names:
            data = folder / f"{name}.jsonl"
            rows = [{"text": f"{name} has a {label}", "label": label} for label in 4 * LABELS]
            data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            _weft(
                home,
                *("node", "init", folder / name, "--name", name, "--public", "--model", model),
                *("--superlink", f"127.0.0.1:{port}", "--root-certificates", authority),
                *("--data", f"notes=jsonl:{data}"),
            )
            _weft(home, "clients", "add", "--join", folder / name / "join.json")
        link = superlink_of(home)
        stack.callback(link.close)

        def there(online: bool) -> bool:
            try:
                return sum(node.online or not online for node in link.nodes()) == size.sites
            except RuntimeGone:
                return False

        _until(lambda: there(False), log)
        for name in names:
            log = folder / f"{name}.log"
            start = ["node", "start", str(folder / name / "node.yaml")]
            stack.enter_context(_running(start, log))
        _until(lambda: there(True), log)
        yield workspace


def _weft(home: Path, *words: str | Path) -> None:
    """Run a command of weft's to its end, in this process."""
    done = CliRunner().invoke(app, [*map(str, words)], env={"WEFT_HOME": str(home)})
    if done.exit_code:
        raise RuntimeError(f"{words}: {done.output} {done.exception!r}")


@contextmanager
def _running(words: Sequence[str], log: Path, **environment: str) -> Iterator[None]:
    """Run a server of weft's until the end of the block."""
    command = bound([sys.executable, "-m", "orchestrator.cli", *words])
    settings = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, env=settings, stdout=sink, stderr=sink) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


def _until(true: Callable[[], bool], log: Path) -> None:
    """Wait until something is true."""
    end = time.monotonic() + UP_WITHIN_S
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"what was waited for has not come: {log.read_text()}")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
