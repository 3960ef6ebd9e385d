"""What weft's backends add to the work: Ray's beside a bare call and Flower's engine; real sites'.

    python benchmarks/overhead.py [--quick] [--json] [--only ray|sites] [--peer] [--clients 100] …

*Ray*: a round in which no client trains. All sides send one broadcast to every client and take
back an update of the same size, over as many worker processes; the work is to send back what came.

*bare* is what a user of Ray would write, in the same Ray as weft's: the broadcast put into the
object store once, numpy arrays in and out, and ``ray.util.ActorPool``, which like weft gives an
actor its next call when it has answered. *weft* is a whole :meth:`RayBackend.run`: assignments out,
each result back as an Update of torch tensors in memory of their own, with a deadline, a second try
elsewhere, and word of who has started. *inline* is the same in this process, which sends nothing.
*flower* is what ``FedAvg.start`` does in a round before it
aggregates: messages made, sent, and all replies received, under ``run_simulation`` in an
environment and a Ray of its own (see ``_flower.py``).

The sides take turns, in an order that changes every round; a figure is the median over rounds of
the time a client, and a ratio that of two medians. *driver-memory* is the largest anonymous memory
of the driver's process in a round of 1 MB a client; pages of Ray's store, whose size is fixed, are
not in it.

``eager`` is one more, harsher peer without a goal: every call is submitted before the first result
is read. A scheduler of clients of unequal length cannot do that: what waits in the queue of a slow
one cannot go to an actor that is free.

*Sites*: rounds over a real SuperLink and real sites, see ``_sites.py``. *message* is from a round's
orders until an update is accepted, less what the site worked at it; *round* until its version is
committed; *loads* how often a site's process loaded the base model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from _figures import Figure, show
from _flower import Engine, add_option, wanted
from _flower import name as flower
from _memory import watched
from _sites import Size
from _sites import measure as measure_sites
from ray.util import ActorPool

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.pace import Stepped
from orchestrator.backends.base import Backend, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.ray import RayBackend
from strategies.base import Broadcast, Update

NUM_TENSORS = 48  # a LoRA adapter on query and value of 12 layers
GOAL = 1.5
LESS_THAN_FLOWER = 2.0
FLAT = 1.05
FLOWER_MB = 1000  # of one round's replies, which its driver holds three times over
POOL = "ray.util.ActorPool"
Round = Callable[[], float]


def echo(assignment: Assignment, stepped: Stepped) -> Update:
    """Return the broadcast as the client's update: a client that does not train."""
    return Update(
        client=assignment.client,
        round=assignment.round,
        base=assignment.base,
        tensors=assignment.broadcast.tensors,
        num_examples=assignment.num_examples,
        metrics={"loss": 0.0},
    )


class Bare:
    """The same work as a user of Ray would write it."""

    def call(self, client: str, arrays: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return what came."""
        return client, arrays


def payload(megabytes: float) -> dict[str, torch.Tensor]:
    """Return an adapter of so many MB (10^6 bytes) in float32; empty for 0."""
    size = int(megabytes * 1e6) // (4 * NUM_TENSORS)
    names = (f"encoder.layer.{n:02}.attention.lora.weight" for n in range(NUM_TENSORS))
    return {name: torch.zeros(size) for name in names} if size else {}


def assignments(tensors: dict[str, torch.Tensor], num_clients: int) -> list[Assignment]:
    """Return one round's assignments, which share one broadcast."""
    common = Assignment(
        action="train",
        run="benchmark",
        client="",
        round=1,
        base="0" * 64,
        model=ModelSpec("none", "classification", labels=("no", "yes")),
        adapter=PluginChoice("lora", {"r": 8}),
        broadcast=Broadcast(tensors),
        data=DataSpec("jsonl:/data/notes.jsonl"),
        optimizer=PluginChoice("adamw", {"lr": 1e-3}),
        site="/nowhere",
        num_examples=100,
    )
    return [
        replace(common, client=f"client-{n:04}", data=DataSpec(f"jsonl:/data/{n}.jsonl"), seed=n)
        for n in range(num_clients)
    ]


def timed(work: Callable[[], None]) -> Round:
    """Return a round that is timed here."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def weft_round(backend: Backend, megabytes: float, num_clients: int) -> Round:
    """Return a round of weft."""
    asked = assignments(payload(megabytes), num_clients)

    def work() -> None:
        results = complete(backend, asked, deadline=600, started=lambda assignment: None)
        count = 0
        for result in results:
            assert isinstance(result, Update), result
            count += 1
        assert count == num_clients

    return timed(work)


def pool_round(actors: Sequence[Any], megabytes: float, num_clients: int) -> Round:
    """Return a round of bare calls over ``ray.util.ActorPool``."""
    arrays = {name: tensor.numpy() for name, tensor in payload(megabytes).items()}
    clients = [f"client-{n:04}" for n in range(num_clients)]

    def work() -> None:
        sent = ray.put(arrays) if arrays else {}
        pool = ActorPool(actors)
        count = 0
        for _, back in pool.map_unordered(lambda a, client: a.call.remote(client, sent), clients):
            assert len(back) == len(arrays)
            count += 1
        assert count == num_clients

    return timed(work)


def eager_round(actors: Sequence[Any], megabytes: float, num_clients: int) -> Round:
    """Return a round of bare calls that are all submitted at once."""
    arrays = {name: tensor.numpy() for name, tensor in payload(megabytes).items()}

    def work() -> None:
        sent = ray.put(arrays) if arrays else {}
        calls = [
            actors[n % len(actors)].call.remote(f"client-{n:04}", sent) for n in range(num_clients)
        ]
        while calls:
            _, back = ray.get(calls.pop(0))
            assert len(back) == len(arrays)

    return timed(work)


def flower_round(engine: Engine, megabytes: float) -> Round:
    """Return a round of Flower, which times itself."""
    return lambda: float(engine.round(megabytes=megabytes)["seconds"])


def interleaved(sides: Sequence[Round], rounds: int) -> list[list[float]]:
    """Return each side's seconds, round by round; the first, unmeasured round warms all up."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for place in range(len(sides)):
            side = (place + turn) % len(sides)
            seconds = sides[side]()
            if turn:
                times[side].append(seconds)
    return times


@dataclass(frozen=True)
class Sides:
    """All who take part at one number of clients."""

    backend: RayBackend
    actors: Sequence[Any]
    engine: Engine | None
    num_clients: int

    def rounds_of(self, megabytes: float) -> dict[str, Round]:
        """Return each side's round by its name; Flower's driver holds all replies at once."""
        found = {
            "weft": weft_round(self.backend, megabytes, self.num_clients),
            "inline": weft_round(InlineBackend(echo), megabytes, self.num_clients),
            "bare": pool_round(self.actors, megabytes, self.num_clients),
            "eager": eager_round(self.actors, megabytes, self.num_clients),
        }
        if self.engine is not None and megabytes * self.num_clients <= FLOWER_MB:
            found["flower"] = flower_round(self.engine, megabytes)
        return found

    def compare(self, megabytes: float, rounds: int) -> list[Figure]:
        """Return the figures of one payload."""
        sides = self.rounds_of(megabytes)
        times = dict(zip(sides, interleaved(list(sides.values()), rounds), strict=True))
        each = {k: [1e3 * s / self.num_clients for s in v] for k, v in times.items()}
        middle = {side: statistics.median(values) for side, values in each.items()}
        peers = {
            "weft": "",
            "inline": "",
            "bare": POOL,
            "eager": "ray calls at once",
            "flower": flower(),
        }
        where = f"{megabytes:g} MB, {self.num_clients} clients, {len(self.actors)} workers"
        name = f"overhead.{self.num_clients}-clients.{megabytes:g}MB"

        def figure(row: str, value: float, goal: float | None, better: str, peer: str) -> Figure:
            unit = "x" if "ratio" in row or "less" in row else "ms/client"
            spread = f"; {min(each[row]):.2f}..{max(each[row]):.2f}" if row in each else ""
            setting = f"{where}, {rounds} rounds{spread}"
            return Figure(f"{name}.{row}", value, unit, goal, better, peer, setting)

        found = [figure(side, middle[side], None, "lower", peers[side]) for side in sides]
        ours = middle["weft"]
        found.append(figure("ratio", ours / middle["bare"], GOAL, "lower", POOL))
        found.append(figure("eager-ratio", ours / middle["eager"], None, "lower", peers["eager"]))
        if "flower" in middle:
            goal = LESS_THAN_FLOWER if megabytes == 0 else None
            less = middle["flower"] / ours
            found.append(figure("less-than-flower", less, goal, "higher", flower()))
        return found


def peak_of(pid: int, run: Round) -> float:
    """Return the largest own memory of a process during a round, in MB."""
    with watched(pid) as peak:
        run()
    return peak.megabytes


def memory_figures(peaks: dict[int, dict[str, float]], workers: int) -> list[Figure]:
    """Return what the drivers took, by number of clients, and how much more for more clients."""
    least, most = min(peaks), max(peaks)
    found = []
    for side in peaks[most]:
        peer = flower() if side == "flower" else ""
        for clients, by_side in peaks.items():
            where = f"1 MB, {clients} clients, {workers} workers; anonymous, at its peak"
            name = f"overhead.{clients}-clients.driver-memory.{side}"
            found.append(Figure(name, by_side[side], "MB", None, "lower", peer, where))
        if least < most:
            goal = FLAT if side == "weft" else None
            growth = peaks[most][side] / peaks[least][side]
            name = f"overhead.driver-memory.{side}-growth"
            where = f"1 MB, {most} clients over {least}"
            found.append(Figure(name, growth, "x", goal, "lower", peer, where))
    return found


def measure(
    num_workers: int, counts: Sequence[int], payloads: Sequence[float], rounds: int, peer: bool
) -> list[Figure]:
    """Return the figures of every number of clients and payload."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as weft does; no warning
    ray.init(
        address="local",  # not the cluster that somebody else may have here
        num_cpus=2 * num_workers,
        object_store_memory=1 << 30,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    backend = RayBackend(num_workers, perform=echo)
    actors = [ray.remote(Bare).options(num_cpus=1).remote() for _ in range(num_workers)]
    found: list[Figure] = []
    try:
        # Memory first: the other sides leave theirs in this process.
        peaks = {n: {"weft": peak_of(os.getpid(), weft_round(backend, 1, n))} for n in counts}
        for count in counts:
            with Engine("echo", count, num_workers) if peer else nullcontext() as engine:
                sides = Sides(backend, actors, engine, count)
                if engine is not None:
                    peaks[count]["flower"] = peak_of(engine.pid, flower_round(engine, 1))
                for megabytes in payloads:
                    large = megabytes * count > FLOWER_MB
                    found += sides.compare(megabytes, min(rounds, 5) if large else rounds)
        return found + memory_figures(peaks, num_workers)
    finally:
        backend.close()
        ray.shutdown()


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 and 60 clients, 5 rounds; 1 site")
    parser.add_argument("--only", choices=["ray", "sites"], help="one part; by default both")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--clients", type=int, action="append", help="a round (default: 100 and 1,000)"
    )
    parser.add_argument(
        "--megabytes", type=float, action="append", help="of an update (default: 0, 1 and 10)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sites", type=int, action="append", help="(default: 1 and 3)")
    parser.add_argument("--rounds", type=int, help="that are measured (default: 9)")
    add_option(parser)
    arguments = parser.parse_args()
    counts = arguments.clients or ([20, 60] if arguments.quick else [100, 1000])
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    payloads = arguments.megabytes or [0, 1, 10]
    figures: list[Figure] = []
    if arguments.only != "sites":
        peer = wanted(arguments)
        figures += measure(arguments.workers, sorted(counts), payloads, rounds, peer)
    if arguments.only != "ray":
        for sites in arguments.sites or ([1] if arguments.quick else [1, 3]):
            figures += measure_sites(Size(sites, rounds))
    show("overhead", figures, arguments.json)


if __name__ == "__main__":
    main()
