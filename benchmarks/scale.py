"""Many clients: does a round stay as fast and as small as the first, and can one look meanwhile?

    python benchmarks/scale.py [--quick] [--json] [--only PART] [--clients 1000] …

*rounds*: a run of 1,000 simulated clients and 10 rounds on Ray workers. Each client does train: a
BERT of two layers, 32 wide, with LoRA, one step of four examples. *Drift* is what the time of a
round, and the memory of driver and workers, gain from round 2 to the last: the median slope between
any two of them (Theil-Sen) times the number of steps, over the median. The processor time of all
processes is given beside the time on the clock, which on a busy machine says little. Virtual
machines change their speed for minutes on end, so a fixed piece of work, the *yardstick*, is timed
before and after each round, and *at equal speed* is a round's time over that of the yardstick
around it, times the yardstick's median: a round that is slower by itself still shows.

*registered*: 10,000 nodes in the ledger, 1,000 sampled a round. Planning is what a federation does
between one round's commit and the first assignment of the next: the history read, the cohort drawn,
assignments made, spends reserved, two events written. Its clients send back what they were sent, at
once and in this process. Afterwards, what a status page asks for is timed.

*virtual*: one data set split into 100,000 clients; a plan is made, a round of 1,000 sampled clients
trains on the Ray workers, and the processes are counted.

Memory is anonymous memory (see ``_memory.py``), at its peak within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, drift, show
from _memory import Peak, actors, family, own, processor_seconds, watched
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from clients import models
from clients.assignment import Assignment
from clients.builtin import parameter_types
from clients.session import returned_names
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.base import Backend, Result, Started, Stepped, unheard
from orchestrator.backends.ray import RayBackend
from orchestrator.config import parse_config
from orchestrator.launch import make_plan
from orchestrator.quarantine import quarantined_in
from orchestrator.views import run_json
from storage.ledger import ClientRecord
from strategies.base import Update

DRIFT, PLANNING_MS, QUERY_MS, EXAMPLES = 0.02, 100.0, 50.0, 4


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        clients: of *rounds*.
        rounds: of *rounds* and *registered*.
        nodes: that are registered.
        cohort: how many of those, and of the virtual clients, a round samples.
        virtual: parts of one data set.
        workers: Ray workers.
    """

    clients: int
    rounds: int
    nodes: int
    cohort: int
    virtual: int
    workers: int


FULL = Size(clients=1000, rounds=10, nodes=10_000, cohort=1000, virtual=100_000, workers=2)
FIELDS = [f.name for f in fields(Size)]
QUICK = Size(clients=40, rounds=4, nodes=1000, cohort=100, virtual=5000, workers=2)


# --- a small model and its data ---------------------------------------------------------------


def small_model(folder: Path) -> Path:
    """Make a BERT of two layers, 32 wide, with the tokenizer of all-MiniLM-L6-v2."""
    tokenizer = AutoTokenizer.from_pretrained(models.locate("builtin:minilm"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int) -> str:
    """Write ``count`` rows, repeating the built-in ones, and return their URI."""
    rows = parameter_types.rows(split="train")
    lines = [json.dumps({"text": row["text"], "label": row["label"]}) for row in rows]
    file.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(count)))
    return f"jsonl:{file}"


def document(model: Path, clients: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the config of a run on the small model."""
    return {
        "name": "benchmark",
        "model": {"id": str(model), "max_length": 32},
        "labels": list(parameter_types.LABELS),
        "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
        "strategy": "fedavg",
        "steps": 1,
        "batch_size": EXAMPLES,
        "clients": clients,
        **changes,
    }


# --- watching a run ---------------------------------------------------------------------------


def yardstick() -> float:
    """Return the seconds of processor time that a fixed piece of work takes just now."""
    taken = []
    for _ in range(7):
        start, value = time.thread_time(), 1
        for n in range(1, 600_000):
            value = value * n % 1_000_003
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


def at_equal_speed(values: Sequence[float], yards: Sequence[float]) -> list[float]:
    """Return rounds' times as they were, had the yardsticks around each been like the median.

    Args:
        values: ``[rounds]`` seconds.
        yards: ``[rounds + 1]`` seconds of the yardstick, before the first round and after each.
    """
    middle = statistics.median(yards)
    around = (statistics.mean(pair) for pair in pairwise(yards))
    return [value * middle / yard for value, yard in zip(values, around, strict=True)]


@dataclass
class Log:
    """Takes note of what each round of a run took."""

    workers: Callable[[], Sequence[int]]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)
    yards: list[float] = field(default_factory=list)
    peak: Peak | None = None
    _since: tuple[float, float] = (0.0, 0.0)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take note of an event."""
        if kind == "committed":
            clock, used = self._now()
            self.seconds.append(clock - self._since[0])
            self.processor.append(used - self._since[1])
            self.worker.append(sum(map(own, self.workers())))
            assert self.peak is not None
            self.driver.append(self.peak.megabytes)
            self.peak.megabytes = 0.0
        if kind in ("started", "committed"):
            self.yards.append(yardstick())
            self._since = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), processor_seconds([os.getpid(), *self.workers()])


def ray_workers() -> list[int]:
    """Return the processes of weft's Ray workers."""
    return actors(family(os.getpid()))


def figure(
    row: str, value: float, unit: str, where: str, goal: float | None = None, better: str = "lower"
) -> Figure:
    """Return a figure of this benchmark; none has a peer."""
    return Figure(f"scale.{row}", value, unit, goal, better, "", where)


# --- rounds -----------------------------------------------------------------------------------


def rounds(size: Size, folder: Path, model: Path, backend: RayBackend) -> list[Figure]:
    """Return how much later rounds differ from earlier ones."""
    uri = write_rows(folder / "rounds.jsonl", EXAMPLES * size.clients)
    simulate = {"data": uri, "by": "iid", "parts": size.clients, "public": True}
    config = parse_config(document(model, {"simulate": simulate}, rounds=size.rounds))
    log = Log(ray_workers)
    workspace = service.open_workspace(folder / "rounds", f"sqlite:///{folder / 'rounds.db'}")
    with watched(os.getpid(), every_s=0.05) as log.peak:
        service.launch(workspace, config, log, backend)
    workspace.close()
    where = f"{size.clients} clients, {size.rounds} rounds, {size.workers} workers"
    found = []
    for row, values, unit, goal in (
        ("yardstick", log.yards, "s", None),
        ("seconds", log.seconds, "s/round", None),
        ("processor", log.processor, "s/round", None),
        ("seconds-at-equal-speed", at_equal_speed(log.seconds, log.yards), "s/round", DRIFT),
        ("processor-at-equal-speed", at_equal_speed(log.processor, log.yards), "s/round", DRIFT),
        ("driver-memory", log.driver, "MB", DRIFT),
        ("worker-memory", log.worker, "MB", DRIFT),
    ):
        later = values[1:]
        spread = f"{where}; rounds 2 on: {min(later):.4g}..{max(later):.4g}"
        found.append(figure(f"rounds.{row}", statistics.median(later), unit, spread))
        found.append(figure(f"rounds.{row}-drift", drift(later), "share", where, goal))
    return found


# --- registered -------------------------------------------------------------------------------


@dataclass
class Immediate:
    """A backend whose clients do not train: each sends back what it was sent, at once."""

    began: list[float] = field(default_factory=list)

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield an update for each assignment; see :class:`orchestrator.backends.base.Backend`."""
        first = True
        for assignment in assignments:
            if assignment is None:
                yield None
                continue
            if assignment.action == "init":
                yield perform(assignment)
                continue
            if first:
                self.began.append(time.perf_counter())
                first = False
            started(assignment)
            names = returned_names(assignment)
            yield Update(
                client=assignment.client,
                round=assignment.round,
                base=assignment.base,
                tensors={name: assignment.broadcast.tensors[name] for name in names},
                num_examples=EXAMPLES,
                metrics={"loss": 0.0},
                fingerprint="0" * 64,
            )

    def close(self) -> None:
        """Nothing to give back."""


def registered(size: Size, folder: Path, model: Path) -> list[Figure]:
    """Return what planning and looking cost with many registered nodes."""
    uri = write_rows(folder / "registered.jsonl", EXAMPLES)
    workspace = service.open_workspace(folder / "nodes", f"sqlite:///{folder / 'nodes.db'}")
    records = [
        ClientRecord(
            name=f"node-{n:05}",
            data=uri,
            population=f"people-{n:05}",
            labels={"site": f"site-{n % 10}"} if n % 1000 else {"site": "rare"},
            public=True,
        )
        for n in range(size.nodes)
    ]
    start = time.perf_counter()
    workspace.ledger.add_clients(records)
    registering = time.perf_counter() - start
    backend, committed = Immediate(), []

    def observe(kind: str, data: Mapping[str, Any]) -> None:
        if kind in ("started", "committed"):
            committed.append(time.perf_counter())

    changes = {"cohort": size.cohort, "rounds": size.rounds}
    config = parse_config(document(model, {"select": {}}, **changes))
    start = time.perf_counter()
    make_plan(config, workspace.store, workspace.ledger)
    planned = time.perf_counter() - start
    service.launch(workspace, config, observe, backend)
    gaps = zip(committed, backend.began, strict=False)
    planning = [1e3 * (began - before) for before, began in gaps]
    where = f"{size.nodes} nodes, {size.cohort} a round"
    spread = f"{where}, {len(planning)} rounds; {min(planning):.1f}..{max(planning):.1f}"
    found = [
        figure("registered.register", registering, "s", f"{size.nodes} nodes, at once"),
        figure("registered.make-plan", planned, "s", f"{where}; once a run"),
        figure("registered.planning", statistics.median(planning), "ms", spread, PLANNING_MS),
        figure("registered.planning-last", planning[-1], "ms", where, PLANNING_MS),
    ]
    found += [
        figure(f"registered.query.{what}", value, "ms", f"{where}; {note}", QUERY_MS)
        for what, value, note in queries(workspace, size)
    ]
    workspace.close()
    return found


def queries(workspace: service.Workspace, size: Size) -> list[tuple[str, float, str]]:
    """Return how many ms each thing takes that a status page asks for, and what it is."""
    ledger = workspace.ledger
    run = ledger.runs(1)[0].id
    last = ledger.events(run)[-1].seq
    middle = f"node-{size.nodes // 2:05}"
    asked: list[tuple[str, Callable[[], Any], str]] = [
        ("runs-show", lambda: shown_run(workspace, run), "a run's record, and who is quarantined"),
        ("runs-list", lambda: ledger.runs(50), "the last 50 runs' records; there is one"),
        ("news", lambda: ledger.events(run, last - 50), f"the last 50 of {last} events"),
        ("clients-list", lambda: ledger.clients(limit=50), "the first 50 nodes"),
        ("clients-page", lambda: ledger.clients(limit=50, after=middle), "50 from the middle"),
        ("label", lambda: ledger.clients({"site": "site-3"}, 50), "50 of a tenth, by a label"),
        ("rare-label", lambda: ledger.clients({"site": "rare"}, 50), "one in 1,000, by a label"),
        ("clients-show", lambda: shown_client(workspace, middle), "a node, what its people spent"),
    ]
    return [(what, middle_ms(call), note) for what, call, note in asked]


def shown_run(workspace: service.Workspace, run: str) -> None:
    """Read what ``weft runs show`` does."""
    run_json(workspace.ledger.run(run))
    quarantined_in(workspace.ledger, run)


def shown_client(workspace: service.Workspace, name: str) -> None:
    """Read what ``weft clients show`` does."""
    record = workspace.ledger.client(name)
    service.spent_by_population(workspace, record.population)


def middle_ms(call: Callable[[], Any], times: int = 7) -> float:
    """Return the median of some calls in ms."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


# --- virtual ----------------------------------------------------------------------------------


def virtual(size: Size, folder: Path, model: Path, backend: RayBackend) -> list[Figure]:
    """Return what it takes to split one data set into many clients and to sample some."""
    uri = write_rows(folder / "virtual.jsonl", size.virtual)
    simulate = {"data": uri, "by": "iid", "parts": size.virtual, "public": True}
    changes = {"cohort": size.cohort, "rounds": 2}
    config = parse_config(document(model, {"simulate": simulate}, **changes))
    workspace = service.open_workspace(folder / "virtual", f"sqlite:///{folder / 'virtual.db'}")
    start = time.perf_counter()
    plan = make_plan(config, workspace.store, workspace.ledger)
    planned = time.perf_counter() - start
    assert len(plan.participants) == size.virtual
    megabytes = len(json.dumps(plan.to_json())) / 1e6
    before, log = len(family(os.getpid())), Log(ray_workers)
    with watched(os.getpid(), every_s=0.05) as log.peak:
        service.launch(workspace, config, log, backend)
    added = len(family(os.getpid())) - before
    workspace.close()
    where = f"{size.virtual} virtual clients, {size.cohort} a round, {size.workers} workers"
    return [
        figure("virtual.make-plan", planned, "s", f"{where}; once a run"),
        figure("virtual.plan-size", megabytes, "MB", f"{where}; JSON on the run's record"),
        figure("virtual.round", log.seconds[-1], "s", f"{where}; the second"),
        figure("virtual.driver-memory", max(log.driver), "MB", where),
        figure("virtual.worker-memory", log.worker[-1] / size.workers, "MB", f"{where}; each"),
        figure("virtual.added-processes", added, "processes", where, 0.0),
    ]


def measure(size: Size, only: str | None) -> list[Figure]:
    """Return the figures of all parts, or of one."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name:
        folder = Path(name)
        model = small_model(folder / "model")
        backend: Backend | None = None
        try:
            if only in (None, "registered"):
                found += registered(size, folder, model)
            if only != "registered":
                backend = RayBackend(size.workers)
                if only in (None, "rounds"):
                    found += rounds(size, folder, model, backend)
                if only in (None, "virtual"):
                    found += virtual(size, folder, model, backend)
        finally:
            if backend is not None:
                backend.close()
    return found


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", choices=("rounds", "registered", "virtual"))
    for name in FIELDS:
        default = f"default: {getattr(FULL, name):,}, quick {getattr(QUICK, name):,}"
        parser.add_argument(f"--{name}", type=int, help=default)
    arguments = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"  # not the cluster that somebody else may have here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = {name: n for name in FIELDS if (n := getattr(arguments, name)) is not None}
    size = replace(QUICK if arguments.quick else FULL, **given)
    show("scale", measure(size, arguments.only), arguments.json)


if __name__ == "__main__":
    main()
