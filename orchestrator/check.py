"""What a run would cost, before anything starts: memory, bytes and ε."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clients import models
from clients.uplink import size_bytes
from orchestrator.beginning import setting_of
from orchestrator.budgets import planned_spends
from orchestrator.cohort import asked_a_round
from orchestrator.committed import begun
from orchestrator.config import RunConfig
from orchestrator.epsilons import Epsilon, composed
from orchestrator.launch import make_plan
from orchestrator.merging import beneath as lying_beneath
from orchestrator.observers.of_run import observers_of
from orchestrator.plan import Plan
from orchestrator.strategy_refusals import adapter_of, strategy_of
from storage.ledger import Ledger
from storage.store import AdapterStore
from strategies.base import ClientSpec, Tensors, beneath

_ACTIVATIONS_PER_TOKEN = 34  # values kept a token, layer and hidden unit for the backward pass
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Check:
    """What a run would be.

    Attributes:
        plan: the plan that would run.
        sizes: from :func:`clients.models.estimate`, in parameters and bytes.
        worker_bytes: estimated peak memory of one worker's tensors.
        round_bytes: what travels in round 1, both ways. Later ones may have less (``downlink:
            held``), or more (a strategy that lays what it learns beneath).
        epsilons: what each client would spend in all, under DP.
    """

    plan: Plan
    sizes: Mapping[str, int]
    worker_bytes: int
    round_bytes: int
    epsilons: Mapping[str, Epsilon]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {
            "name": self.plan.config.name,
            "rounds": self.plan.config.rounds,
            "clients": [p.name for p in self.plan.participants],
            "cohort": asked_a_round(self.plan),
            "base_hash": self.plan.model.hash,
            "library": list(self.plan.library),
            **self.sizes,
            "worker_bytes": self.worker_bytes,
            "round_bytes": self.round_bytes,
            "run_bytes": self.round_bytes * self.plan.config.rounds,
            "epsilon": {
                name: {
                    "epsilon": e.epsilon,
                    "delta": e.delta,
                    "unit": e.unit,
                    "adjacency": e.adjacency,
                    "noise_multiplier": self._noise(name),
                }
                for name, e in self.epsilons.items()
            },
        }

    def _noise(self, name: str) -> float | None:
        if self.plan.central is not None:
            return self.plan.central.noise_multiplier
        who = next(p for p in self.plan.participants if p.name == name)
        return who.privacy.noise_multiplier if who.privacy else None


def check(
    config: RunConfig, store: AdapterStore, ledger: Ledger, sites: Path | None = None
) -> Check:
    """Return what a run of ``config`` would cost; trains nothing and starts nothing.

    Args:
        config: the run.
        store: the versions it may start from.
        ledger: the clients and their budgets.
        sites: folder of the clients' private state, where it is looked up whose data share records.

    Raises:
        BadConfig: if it cannot be run.
        LoggerUnavailable, BadWebhook: if a logger or the webhook cannot be had here.
    """
    plan = make_plan(config, store, ledger, sites)
    observers_of(plan, Path())
    adapter = adapter_of(plan)
    sizes, shapes = models.estimate(plan.model, adapter), models.shapes(plan.model, adapter)
    back = size_bytes(plan.uplink, shapes) if plan.uplink else sizes["adapter_bytes"]
    return Check(
        plan=plan,
        sizes=sizes,
        worker_bytes=_worker_bytes(config, sizes, "offset" in adapter.capabilities),
        round_bytes=(_sent_bytes(plan, store, shapes) + back) * asked_a_round(plan),
        epsilons=_epsilons(plan),
    )


def _sent_bytes(plan: Plan, store: AdapterStore, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return what a client is sent in round 1: what it trains, what lies beneath, and memory."""
    start, strategy = plan.start, strategy_of(plan)
    tensors: Tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    memory: Tensors = store.memory(start.version) if start.version else {}
    below = [lying_beneath(store, start.stack, start.offset)]
    if start.mode == "continue" and start.version:
        tensors = store.tensors(start.version)
        below.append(beneath(store.auxiliary(start.version)))
    state = strategy.init(tensors, setting_of(plan, store))
    who = plan.participants[0]
    sent = strategy.broadcast(state, ClientSpec(who.name, labels=who.labels))
    kept = begun(plan, state.adapter, memory)
    parts = (sent.tensors, sent.mask, sent.extra, beneath(state.auxiliary), kept, *below)
    return sum(tensor.nbytes for part in parts for tensor in part.values())


def _worker_bytes(config: RunConfig, sizes: Mapping[str, int], offset: bool) -> int:
    """Return base + adapter (value, gradient, two moments, per-example gradients) + activations.

    An offset is a second copy of the adapter, frozen underneath.
    """
    examples = config.batch_size * (config.dp_sgd.per_unit if config.dp_sgd else 1)
    batch = min(config.microbatch, examples)
    copies = 4 + (batch if config.dp_sgd else 0) + offset
    layers_hidden = sizes["base_parameters"] // 12  # a block has about 12 hidden² parameters
    width = max(1, math.isqrt(layers_hidden))
    activations = batch * config.model.max_length * width * _ACTIVATIONS_PER_TOKEN * _FLOAT
    held: int = sizes["base_bytes"] + copies * sizes["adapter_bytes"] + activations
    return held


def _epsilons(plan: Plan) -> dict[str, Epsilon]:
    privacy, spends = plan.config.privacy, planned_spends(plan)
    return {
        who.name: composed(
            who.population, spends[who.name], privacy.delta, privacy.accountant, who.public
        )
        for who in plan.participants
        if privacy is not None and who.name in spends
    }
