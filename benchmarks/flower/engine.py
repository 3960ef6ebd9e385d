"""Runs Flower's simulation engine round by round, as ../_flower.py asks for it; needs no weft.

    python engine.py echo|training NODES WORKERS [JOB]

A line of JSON on stdin is one round; one on stdout is what it took. Everything is Flower's own:
``run_simulation`` with its Ray backend, a ``ServerApp`` that does what ``FedAvg.start`` does in a
round, and a ``ClientApp`` in a module of its own, so that what it caches stays in its actor.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

NUM_TENSORS = 48  # as in ../overhead.py


def payload(megabytes: float) -> ArrayRecord:
    """Return an adapter of so many MB in float32; empty for 0."""
    size = int(megabytes * 1e6) // (4 * NUM_TENSORS)
    names = (f"encoder.layer.{n:02}.attention.lora.weight" for n in range(NUM_TENSORS))
    return ArrayRecord({n: Array(np.zeros(size, np.float32)) for n in names} if size else {})


def first_tensors(job: str) -> ArrayRecord:
    """Return the adapter that round 1 starts from."""
    from safetensors.torch import load_file

    return ArrayRecord(load_file(json.loads(Path(job).read_text())["tensors"]))


def serve(grid: Grid, nodes: int, job: str) -> None:
    """Run a round for every line of stdin."""
    while len(list(grid.get_node_ids())) < nodes:  # they register while the server app runs
        time.sleep(0.1)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    arrays = first_tensors(job) if job else ArrayRecord()
    say(ready=True)
    for number, line in enumerate(sys.stdin, start=1):
        asked = json.loads(line)
        if not job:
            arrays = payload(asked["megabytes"])
        start = time.perf_counter()
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages, timeout=3600))
        metrics: dict[str, Any] = {}
        if job:
            averaged, found = strategy.aggregate_train(number, replies)
            arrays, metrics = averaged or arrays, dict(found or {})
        seconds = time.perf_counter() - start
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) != nodes:
            raise RuntimeError(f"{len(replies)} of {nodes} replies, {len(failed)} errors: {failed}")
        del messages, replies
        say(seconds=seconds, loss=metrics.get("loss"))


def say(**what: Any) -> None:
    """Answer."""
    print(json.dumps(what), file=ANSWERS, flush=True)


def main() -> None:
    """Run the simulation until stdin ends."""
    app, nodes, workers, *job = sys.argv[1:]
    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        serve(grid, int(nodes), job[0] if job else "")

    run_simulation(
        server_app=server,
        client_app=importlib.import_module(app).app,
        num_supernodes=int(nodes),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",  # not the cluster that somebody else may have here
                "num_cpus": int(workers),
                "object_store_memory": 1 << 30,
            },
        },
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    ANSWERS = os.fdopen(os.dup(1), "w")  # whatever else prints goes to the log
    os.dup2(2, 1)
    main()
