"""A federated run of simulated clients: clients a second and memory, beside a bare loop and Flower.

    python benchmarks/simulate.py [--quick] [--json] [--peer] [--clients 100] [--workers 2]

The job: all-MiniLM-L6-v2 with LoRA of rank 8 on query and value and a head over eight classes, data
of ``builtin:parameter-types`` dealt to the clients, one epoch a round of AdamW in batches of 16 of
at most 32 tokens; FedAvg; one thread a process and as many processes on every side.

*weft* is ``service.launch`` with its Ray backend: a round is planned, trained, each update stored
at the client, checked, spilled and logged, aggregated, and committed as a version. *bare* is
``_plain_loop.py`` in processes that have the model, the adapter and all tokens in memory: no round,
no server. *flower* is the same plain loop in a ``ClientApp`` whose actor keeps all that too (an
``lru_cache`` in an importable module), under ``run_simulation`` with ``num_cpus: 1`` a client, and
``FedAvg`` in the server; in an environment of its own (see ``_flower.py``).

All sides train the same examples in the same batches from the same first tensors; their mean losses
in round 1 are compared. They take turns, round by round, the first round unmeasured; a ratio is the
median of those of the rounds, because what else the machine does changes from round to round.

Memory is PSS after the last round. *private-weights* is the share of the base model's weights that
a worker holds in pages of its own (pagemap), not shared with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _figures import Figure, show
from _flower import Engine, add_option, wanted
from _flower import name as flower
from _memory import actors, family, private_bytes, pss
from safetensors.torch import save_file

from clients import models, partition
from clients.assignment import Assignment
from clients.builtin import parameter_types
from clients.evaluate import Evaluation
from clients.pace import Stepped
from clients.seeds import seed_for
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.base import complete
from orchestrator.backends.ray import RayBackend
from orchestrator.config import RunConfig, parse_config
from orchestrator.plan import Plan, RoundInputs, plan_round
from strategies.base import Broadcast, Update

BARE, SHARED = "bare loop", 0.1
GOALS = {"bare": 0.9, "flower": 1.5}
RANK, BATCH, MAX_LENGTH, LR = 8, 16, 32, 1e-3


@dataclass(frozen=True)
class Job:
    """What is trained, by whom and for how long."""

    folder: Path
    clients: int
    examples: int
    rounds: int
    workers: int

    @property
    def rows(self) -> Path:
        """The file of all clients' data."""
        return self.folder / "rows.jsonl"

    def config(self) -> RunConfig:
        """Return weft's side of it."""
        source = {"data": f"jsonl:{self.rows}", "by": "iid", "parts": self.clients, "public": True}
        return parse_config(
            {
                "name": "benchmark",
                "model": {"id": "builtin:minilm", "max_length": MAX_LENGTH},
                "labels": list(parameter_types.LABELS),
                "adapter": {"name": "lora", "r": RANK, "target_modules": ["query", "value"]},
                "strategy": "fedavg",
                "optimizer": {"name": "adamw", "lr": LR},
                "rounds": self.rounds + 1,
                "epochs": 1,
                "batch_size": BATCH,
                "clients": {"simulate": source},
                "backend": {"name": "ray", "workers": self.workers},
            }
        )

    def write_rows(self) -> None:
        """Write the clients' data."""
        rows = parameter_types.rows(split="train")[: self.clients * self.examples]
        if len(rows) < self.clients * self.examples:
            raise SystemExit(f"{self.clients} clients of {self.examples} examples: too few rows")
        lines = (json.dumps({"text": row["text"], "label": row["label"]}) for row in rows)
        self.rows.write_text("".join(f"{line}\n" for line in lines))

    def write(self, tensors: Mapping[str, Any]) -> Path:
        """Write the plain loop's side of it, and return where."""
        first = self.folder / "first.safetensors"
        save_file({k: v for k, v in tensors.items() if not k.endswith(".scaling")}, first)
        names = [f"part-{i}" for i in range(self.clients)]
        job = {
            "model": str(models.locate("builtin:minilm")),
            "labels": list(parameter_types.LABELS),
            "rows": str(self.rows),
            "tensors": str(first),
            "parts": partition.iid(self.clients * self.examples, self.clients, 0),
            "seeds": [[seed_for(0, r, n) for n in names] for r in range(1, self.rounds + 2)],
            "rank": RANK,
            "batch_size": BATCH,
            "max_length": MAX_LENGTH,
            "lr": LR,
        }
        path = self.folder / "job.json"
        path.write_text(json.dumps(job))
        return path

    def __str__(self) -> str:
        return f"{self.clients} clients of {self.examples} examples, {self.workers} workers"


class Bare:
    """Processes that train without a federation, each its share of the clients."""

    def __init__(self, job: Job, file: Path) -> None:
        script = Path(__file__).with_name("_plain_loop.py")
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._clients = job.clients
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environ | {"OMP_NUM_THREADS": "1"},
            )
            for _ in range(job.workers)
        ]
        for process in self._processes:
            self._hear(process)

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [process.pid for process in self._processes]

    def round(self, number: int) -> dict[str, Any]:
        """Train every client once; return the seconds, the mean loss and the private weights."""
        start = time.perf_counter()
        for place, process in enumerate(self._processes):
            parts = list(range(place, self._clients, len(self._processes)))
            assert process.stdin is not None
            print(json.dumps({"round": number, "parts": parts}), file=process.stdin, flush=True)
        answers = [self._hear(process) for process in self._processes]
        seconds = time.perf_counter() - start
        losses = [loss for answer in answers for loss in answer["losses"]]
        private = [answer["private_weights"] for answer in answers]
        return {"seconds": seconds, "loss": statistics.fmean(losses), "private": private}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a bare process has ended; run benchmarks/_plain_loop.py by hand")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Turns:
    """Watches weft's run and gives the others their turn after each of its rounds."""

    job: Job
    workspace: service.Workspace
    stack: ExitStack
    peer: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    private: list[tuple[int, int]] = field(default_factory=list)
    bare: Bare = field(init=False)
    engine: Engine | None = None
    _began: float = 0.0
    _own: list[float] = field(default_factory=list)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take note of an event of weft's run."""
        if kind == "started":
            self._meet(data["version"])
        elif kind == "accepted" and "weft" not in self.losses:
            self._own.append(data["loss"])
        elif kind == "committed":
            self._note("weft", data["round"], time.perf_counter() - self._began)
            self.losses.setdefault("weft", statistics.fmean(self._own))
            self._others(data["round"])
            if data["round"] == self.job.rounds + 1:
                self._weigh()
            self._began = time.perf_counter()

    def _meet(self, version: str) -> None:
        file = self.job.write(self.workspace.store.tensors(version))
        self.bare = Bare(self.job, file)
        self.stack.callback(self.bare.close)
        if self.peer:
            engine = Engine("training", self.job.clients, self.job.workers, file)
            self.engine = self.stack.enter_context(engine)
        self._began = time.perf_counter()

    def _others(self, round_: int) -> None:
        sides = ["bare", "flower"] if self.engine is not None else ["bare"]
        for side in sides if round_ % 2 else reversed(sides):
            if side == "bare":
                answer = self.bare.round(round_)
                self.private = answer["private"]
            else:
                assert self.engine is not None
                answer = self.engine.round()
            self._note(side, round_, answer["seconds"])
            self.losses.setdefault(side, answer["loss"])

    def _note(self, side: str, round_: int, seconds: float) -> None:
        print(f"round {round_ - 1}: {side} {seconds:.2f} s", file=sys.stderr)
        if round_ > 1:
            self.seconds.setdefault(side, []).append(seconds)

    def _weigh(self) -> None:
        theirs = [self.engine.pid] if self.engine is not None else []
        roots = {"weft": [os.getpid()], "bare": self.bare.pids, "flower": theirs}
        for side, pids in roots.items():
            without = [*self.bare.pids, *theirs] if side == "weft" else []
            everyone = [one for pid in pids for one in family(pid, without)]
            if everyone:
                self.memory[f"{side}.total"] = sum(map(pss, everyone))
                self.memory[f"{side}.driver"] = pss(pids[0])
                self.memory[f"{side}.worker"] = statistics.fmean(
                    map(pss, actors(everyone) or everyone)
                )


WEIGHED = "weighed"  # as the run of an assignment: its worker is weighed too


def work(assignment: Assignment, stepped: Stepped) -> Update | Evaluation:
    """Do what weft's workers do; where it is asked for, weigh the worker afterwards.

    Then the metrics are how many bytes of the base model's weights this process has alone.
    """
    update = perform(assignment, stepped)
    if assignment.run != WEIGHED:
        return update
    assert isinstance(update, Update)
    weights = models.load(assignment.model, assignment.device).backbone.parameters()
    private, total = private_bytes(weights)
    metrics = {"process": float(os.getpid()), "private": float(private), "total": float(total)}
    return replace(update, metrics=metrics)


def private_shares(
    job: Job, workspace: service.Workspace, version: str, backend: RayBackend
) -> list[float]:
    """Return which share of the base model's weights each of weft's workers has alone."""
    [record] = workspace.ledger.runs(1)
    plan = replace(Plan.from_json(workspace.ledger.plan(record.id)), run=WEIGHED)
    inputs = RoundInputs(1, version, {}, {}, str(workspace.home / "sites"))
    sent = Broadcast(workspace.store.tensors(version))
    asked = plan_round(plan, inputs, lambda client: sent, plan.participants[: 4 * job.workers])
    shares: dict[float, float] = {}
    for result in complete(backend, asked, deadline=600, started=lambda assignment: None):
        assert isinstance(result, Update), result
        found = result.metrics
        shares[found["process"]] = found["private"] / found["total"]
    return list(shares.values())


def measure(job: Job, peer: bool) -> list[Figure]:
    """Return the figures of one job."""
    job.write_rows()
    workspace = service.open_workspace(job.folder / "home", "sqlite:///" + str(job.folder / "db"))
    with ExitStack() as stack:
        turns = Turns(job, workspace, stack, peer)
        backend = RayBackend(job.workers, perform=work)
        stack.callback(backend.close)
        version = service.launch(workspace, job.config(), turns, backend)
        shares = private_shares(job, workspace, version, backend)
    workspace.close()
    return [*speed(job, turns), *memory(job, turns, shares)]


def speed(job: Job, turns: Turns) -> list[Figure]:
    """Return clients a second, weft's against the others', and the losses."""
    rates = {side: [job.clients / s for s in taken] for side, taken in turns.seconds.items()}
    middle = {side: statistics.median(values) for side, values in rates.items()}
    peers = {"weft": "", "bare": BARE, "flower": flower()}
    found = []
    for side, values in rates.items():
        where = f"{job}, {len(values)} rounds; {min(values):.2f}..{max(values):.2f}"
        row = f"simulate.{side}"
        found.append(Figure(row, middle[side], "clients/s", None, "higher", peers[side], where))
    for side in [s for s in middle if s != "weft"]:
        each = [a / b for a, b in zip(rates["weft"], rates[side], strict=True)]
        where = f"{job}; round by round {min(each):.2f}..{max(each):.2f}"
        row = f"simulate.over-{side}"
        found.append(
            Figure(row, statistics.median(each), "x", GOALS[side], "higher", peers[side], where)
        )
        apart = abs(turns.losses[side] - turns.losses["weft"]) / turns.losses["weft"]
        where = f"{job}; mean of round 1, weft {turns.losses['weft']:.4f}"
        row = f"simulate.{side}-loss-difference"
        found.append(Figure(row, apart, "relative", 1e-4, "lower", peers[side], where))
    return found


def memory(job: Job, turns: Turns, shares: Sequence[float]) -> list[Figure]:
    """Return what all processes of each side take, and how much of the weights is private."""
    found = []
    for row, value in turns.memory.items():
        side, _, part = row.partition(".")
        if side == "bare" and part == "driver":
            continue
        peer = {"weft": "", "bare": BARE, "flower": flower()}[side]
        note = {"total": "all processes", "driver": "the driver", "worker": "a worker"}[part]
        where = f"{job}; PSS of {note}"
        found.append(Figure(f"simulate.memory.{row}", value, "MB", None, "lower", peer, where))
    where = f"{job}; of the base model's bytes, a worker's own"
    ours, bare = max(shares), max(private / total for private, total in turns.private)
    found.append(Figure("simulate.private-weights", ours, "share", SHARED, "lower", "", where))
    found.append(Figure("simulate.private-weights.bare", bare, "share", None, "lower", BARE, where))
    return found


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 clients of 16 examples")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--clients", type=int, help="default: 100")
    parser.add_argument("--examples", type=int, help="a client (default: 32)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="that are measured (default: 5)")
    add_option(parser)
    a = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"  # not the cluster that somebody else may have here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    clients = a.clients or (8 if a.quick else 100)
    examples = a.examples or (16 if a.quick else 32)
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        job = Job(Path(folder), clients, examples, a.rounds, a.workers)
        show("simulate", measure(job, wanted(a)), a.json)


if __name__ == "__main__":
    main()
