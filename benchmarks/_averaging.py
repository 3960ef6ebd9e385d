"""FedAvg's mean beside a copy of the same bytes, and beside Flower's means of the same tensors.

Bytes are those of the updates, read once. The copy writes as many again, into memory that is there;
a mean writes one update's. Flower's ``aggregate`` gets arrays; ``aggregate_inplace`` and what its
FedAvg calls, ``aggregate_arrayrecords``, get what clients send and take the arrays out of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from _figures import Figure
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server.strategy.aggregate import aggregate, aggregate_inplace
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from strategies.base import ServerState, Update
from strategies.fedavg import FedAvg

UPDATE_BYTES = 2**23
_TURNS = 9


def measure(size: int, num_updates: int, rank: int, *, quick: bool = False) -> list[Figure]:
    """Return the figures at one size: updates of 8 MiB, of square layers.

    Quick leaves out the metric that FedAvg tells unless it is asked not to, which takes longest.
    """
    num_layers = max(1, UPDATE_BYTES // (8 * size * rank))
    updates = _updates(size, num_updates, rank, num_layers)
    num_bytes = sum(t.nbytes for u in updates for t in u.tensors.values())
    sides = {"copy": _copy(updates), **_ours(updates), **_flowers(updates)}
    if quick:
        del sides["fedavg-and-its-error"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(_TURNS):
        for name, side in sides.items():
            begun = clock()
            result = side()
            seconds[name].append(clock() - begun)
            del result
    speeds = {n: num_bytes / statistics.median(s) / 1e9 for n, s in seconds.items()}
    sent = max(("flower-fedavg", "flower-aggregate-inplace"), key=speeds.__getitem__)

    threads = torch.get_num_threads()
    where = f"d={size} N={num_updates} r={rank} {num_layers} layers float32 threads={threads}"
    figures = [
        Figure(
            f"aggregation.averaging.{name}",
            speed,
            "GB/s",
            None,
            "higher",
            "a copy of the same bytes",
            f"{where}; {_span(num_bytes, seconds[name])} of {_TURNS}",
        )
        for name, speed in speeds.items()
    ]
    ratios = [
        ("of-a-copy", "copy", 0.5, "a copy of the same bytes"),
        ("of-flowers-fedavg", sent, 3.0, f"flwr 1.41, {sent}: the faster of its two FedAvgs"),
        ("of-flowers-aggregate", "flower-aggregate", 3.0, "flwr 1.41, aggregate of arrays"),
    ]
    return figures + [
        Figure(f"aggregation.averaging.{name}", ratio, "x", goal, "higher", peer, where)
        for name, peer_side, goal, peer in ratios
        for ratio in [speeds["fedavg"] / speeds[peer_side]]
    ]


def clock() -> float:
    """Return seconds: where one thread works its processor's, in which others' do not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _updates(size: int, num_updates: int, rank: int, num_layers: int) -> list[Update]:
    generator = torch.Generator().manual_seed(0)
    return [
        Update(
            f"{n:03}",
            1,
            "",
            {
                f"{layer:03}.lora_{factor}.weight": torch.randn(shape, generator=generator)
                for layer in range(num_layers)
                for factor, shape in (("A", (rank, size)), ("B", (size, rank)))
            },
            num_examples=100 + n,
        )
        for n in range(num_updates)
    ]


Side = Callable[[], object]


def _copy(updates: list[Update]) -> Side:
    there = [{n: torch.zeros_like(t) for n, t in u.tensors.items()} for u in updates]

    def copy() -> None:
        for update, target in zip(updates, there, strict=True):
            for name, tensor in update.tensors.items():
                target[name].copy_(tensor)

    return copy


def _ours(updates: list[Update]) -> Mapping[str, Side]:
    scalings = {
        n.replace("lora_A.weight", "scaling"): torch.ones(())
        for n in updates[0].tensors
        if "lora_A" in n
    }
    adapter: dict[str, Tensor] = {**updates[0].tensors, **scalings}
    mean, watched = FedAvg(averaging_error=False), FedAvg()
    return {
        "fedavg": lambda: mean.aggregate(ServerState(adapter), updates),
        "fedavg-and-its-error": lambda: watched.aggregate(ServerState(adapter), updates),
    }


def _flowers(updates: list[Update]) -> Mapping[str, Side]:
    arrays = [([t.numpy() for t in u.tensors.values()], u.num_examples) for u in updates]
    sent = [
        (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(one), count, {}))
        for one, count in arrays
    ]
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord(dict(u.tensors)),
                "metrics": MetricRecord({"num-examples": u.num_examples}),
            }
        )
        for u in updates
    ]
    return {
        "flower-aggregate": lambda: aggregate(arrays),
        "flower-aggregate-inplace": lambda: aggregate_inplace(sent),
        "flower-fedavg": lambda: aggregate_arrayrecords(records, "num-examples"),
    }


def _span(num_bytes: int, seconds: list[float]) -> str:
    return f"{num_bytes / max(seconds) / 1e9:.3g}..{num_bytes / min(seconds) / 1e9:.3g}"
