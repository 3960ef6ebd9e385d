"""What weft's Ray backend adds to a bare Ray actor call: a round in which no client trains.

    python benchmarks/overhead.py [--quick] [--json] [--clients 100] [--workers 2] [--rounds 9]

Both sides send one broadcast to every client of a round and take back an update of the same size,
over the same number of actors in the same Ray; the work is to send back what came. The bare side
is what a user of Ray would write: the broadcast put into the object store once, numpy arrays in
and out, and ``ray.util.ActorPool``, which like weft gives an actor its next call when it has
answered.

weft's side is a whole :meth:`RayBackend.run`: assignments out, each result back as an Update of
torch tensors in memory of their own, with a deadline, a second try elsewhere, and word of who has
started. The sides take turns, in an order that changes every round; a figure is the median over
rounds of the time a client, and a ratio that of two medians.

``eager`` is a second, harsher peer without a goal: every call is submitted before the first result
is read. A scheduler of clients of unequal length cannot do that: what waits in the queue of a slow
one cannot go to an actor that is free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from _figures import Figure, show
from ray.util import ActorPool

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.pace import Stepped
from orchestrator.backends.base import complete
from orchestrator.backends.ray import RayBackend
from strategies.base import Broadcast, Update

NUM_TENSORS = 48  # a LoRA adapter on query and value of 12 layers
GOAL = 1.5
Round = Callable[[], None]


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
        replace(common, client=f"client-{n:03}", data=DataSpec(f"jsonl:/data/{n}.jsonl"), seed=n)
        for n in range(num_clients)
    ]


def weft_round(backend: RayBackend, megabytes: float, num_clients: int) -> Round:
    """Return a round of weft."""
    asked = assignments(payload(megabytes), num_clients)

    def run() -> None:
        results = complete(backend, asked, deadline=600, started=lambda assignment: None)
        count = 0
        for result in results:
            assert isinstance(result, Update), result
            count += 1
        assert count == num_clients

    return run


def pool_round(actors: Sequence[Any], megabytes: float, num_clients: int) -> Round:
    """Return a round of bare calls over ``ray.util.ActorPool``."""
    arrays = {name: tensor.numpy() for name, tensor in payload(megabytes).items()}
    clients = [f"client-{n:03}" for n in range(num_clients)]

    def run() -> None:
        sent = ray.put(arrays) if arrays else {}
        pool = ActorPool(actors)
        count = 0
        for _, back in pool.map_unordered(lambda a, client: a.call.remote(client, sent), clients):
            assert len(back) == len(arrays)
            count += 1
        assert count == num_clients

    return run


def eager_round(actors: Sequence[Any], megabytes: float, num_clients: int) -> Round:
    """Return a round of bare calls that are all submitted at once."""
    arrays = {name: tensor.numpy() for name, tensor in payload(megabytes).items()}

    def run() -> None:
        sent = ray.put(arrays) if arrays else {}
        calls = [
            actors[n % len(actors)].call.remote(f"client-{n:03}", sent) for n in range(num_clients)
        ]
        while calls:
            _, back = ray.get(calls.pop(0))
            assert len(back) == len(arrays)

    return run


def interleaved(sides: Sequence[Round], rounds: int) -> list[list[float]]:
    """Return each side's seconds, round by round; the first, unmeasured round warms all up."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for place in range(len(sides)):
            side = (place + turn) % len(sides)
            start = time.perf_counter()
            sides[side]()
            if turn:
                times[side].append(time.perf_counter() - start)
    return times


def compare(
    backend: RayBackend, actors: Sequence[Any], megabytes: float, num_clients: int, rounds: int
) -> list[Figure]:
    """Return the figures of one payload."""
    sides = [
        weft_round(backend, megabytes, num_clients),
        pool_round(actors, megabytes, num_clients),
        eager_round(actors, megabytes, num_clients),
    ]
    per_client = [
        [1e3 * seconds / num_clients for seconds in side] for side in interleaved(sides, rounds)
    ]
    ours, pool, eager = (statistics.median(side) for side in per_client)
    spans = [f"{min(side):.2f}..{max(side):.2f}" for side in per_client]
    where = f"{megabytes:g} MB, {num_clients} clients, {len(actors)} workers, {rounds} rounds"
    name = f"overhead.{megabytes:g}MB"
    rows = [
        ("weft", ours, "ms/client", None, "", f"{where}; {spans[0]} ms"),
        ("bare", pool, "ms/client", None, "ray.util.ActorPool", f"{where}; {spans[1]} ms"),
        ("eager", eager, "ms/client", None, "ray calls at once", f"{where}; {spans[2]} ms"),
        ("ratio", ours / pool, "x", GOAL, "ray.util.ActorPool", where),
        ("eager-ratio", ours / eager, "x", None, "ray calls at once", where),
    ]
    return [
        Figure(f"{name}.{row}", value, unit, goal, "lower", peer, setting)
        for row, value, unit, goal, peer, setting in rows
    ]


def measure(num_workers: int, num_clients: int, rounds: int) -> list[Figure]:
    """Return the figures of every payload."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as weft does; no warning
    ray.init(
        num_cpus=2 * num_workers,
        object_store_memory=1 << 30,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    backend = RayBackend(num_workers, perform=echo)
    actors = [ray.remote(Bare).options(num_cpus=1).remote() for _ in range(num_workers)]
    try:
        return [
            figure
            for megabytes in (0, 1, 10)
            for figure in compare(backend, actors, megabytes, num_clients, rounds)
        ]
    finally:
        backend.close()
        ray.shutdown()


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="50 clients, 5 rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--clients", type=int, help="a round (default: 100)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="that are measured (default: 9)")
    arguments = parser.parse_args()
    num_clients = arguments.clients or (50 if arguments.quick else 100)
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    figures = measure(arguments.workers, num_clients, rounds)
    show("overhead", figures, arguments.json)


if __name__ == "__main__":
    main()
