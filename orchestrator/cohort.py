"""Whom a round asks: pure functions of the plan and the run's history.

The draw is weighted and without replacement: each client gets an exponential random number over its
weight, and the smallest are chosen, which is drawing one by one in proportion to the weights (arXiv
1012.0256, algorithm A-ES). It costs a few vector operations, however many clients there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.seeds import seed_for
from orchestrator.config import RunConfig
from orchestrator.history import History
from orchestrator.plan import Participant, Plan
from orchestrator.policy import Cohort, share
from orchestrator.quarantine import quarantined

_LONGEST_REST = 20  # doublings; no run has so many rounds


@dataclass(frozen=True, slots=True)
class Roster:
    """Who may be asked at all, for the whole run.

    Attributes:
        names: sorted.
        places: of the names.
        weights: ``[clients]``, float64: chances relative to each other.
    """

    names: tuple[str, ...]
    places: Mapping[str, int]
    weights: Tensor


def roster(participants: Sequence[Participant], cohort: Cohort) -> Roster:
    """Return who may be asked: the participants with the labels of ``cohort.where``."""
    wanted = cohort.where.items()
    chosen = sorted(
        (p for p in participants if not wanted or wanted <= dict(p.labels).items()),
        key=lambda p: p.name,
    )
    sizes = [float(p.num_examples) if cohort.weight == "examples" else 1.0 for p in chosen]
    names = tuple(p.name for p in chosen)
    places = {name: place for place, name in enumerate(names)}
    return Roster(names, places, torch.tensor(sizes, dtype=torch.float64))


def draw(known: Roster, size: int, seed: int, without: Iterable[str] = ()) -> tuple[str, ...]:
    """Return ``size`` names drawn without replacement in proportion to their weights, sorted.

    Those in ``without`` and those of weight 0 are never drawn; fewer than ``size`` are returned
    where fewer are left.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(len(known.names), dtype=torch.float64).exponential_(generator=generator)
    keys /= known.weights
    out = [known.places[name] for name in without if name in known.places]
    keys[out] = float("inf")
    left = int(torch.isfinite(keys).sum())
    places = torch.topk(keys, min(size, left), largest=False).indices
    return tuple(known.names[place] for place in sorted(places.tolist()))


def goal(config: RunConfig, num_clients: int) -> int:
    """Return with how many updates a round closes."""
    if config.asynchronous is not None:
        return config.asynchronous.buffer
    return config.cohort.goal(num_clients)


def quorum(config: RunConfig, num_clients: int) -> int:
    """Return with how many updates a round makes do at its deadline."""
    given = config.quorum
    if isinstance(given, float):
        return share(given, goal(config, num_clients))
    return given or 1


def asked_a_round(plan: Plan) -> int:
    """Return how many clients a round asks, or an asynchronous run for each version."""
    num_clients = len(roster(plan.participants, plan.config.cohort).names)
    if plan.config.asynchronous is not None:
        return min(plan.config.asynchronous.buffer, num_clients)
    return plan.config.cohort.to_ask(num_clients)


def cohort_of(
    plan: Plan, known: Roster, history: History, unreachable: Collection[str] = ()
) -> tuple[str, ...]:
    """Return whom the next round asks at its start, sorted.

    Args:
        plan: the run's plan.
        known: who may be asked at all.
        history: of the run; a client is not asked while it owes an answer, has no round left, or
            was quarantined. One that rests is, where too few are left without it.
        unreachable: who cannot be asked now.
    """
    config, round_ = plan.config, history.round + 1
    barred = {*_barred(plan, history, round_), *unreachable}
    rest = resting(config, history, round_) - barred
    left = len(known.names) - sum(name in known.places for name in barred | rest)
    if left < quorum(config, len(known.names)):
        rest = set()
    size = config.cohort.to_ask(len(known.names))
    return draw(known, size, seed_for(config.seed, round_, "cohort"), barred | rest)


def asked_next(
    plan: Plan, known: Roster, history: History, unreachable: Collection[str] = ()
) -> tuple[str, ...]:
    """Return whom an asynchronous run asks now, so that as many train as it wants, sorted.

    Nobody is asked twice from one version. Who rests is asked where nobody else trains.
    """
    config, opened = plan.config, history.open
    assert config.asynchronous is not None
    assert opened is not None
    count = config.asynchronous.concurrency - len(history.pending)
    if count < 1:
        return ()
    barred = {
        *_barred(plan, history, opened.round),
        *unreachable,
        *opened.assigned,
        *opened.refused,
        *(client for client, asked_in in history.taken if asked_in == opened.round),
    }
    seed = seed_for(config.seed, opened.round, "cohort", len(opened.assigned))
    rest = resting(config, history, opened.round)
    found = draw(known, count, seed, barred | rest)
    return found if found or history.pending else draw(known, count, seed, barred)


def resting(config: RunConfig, history: History, round_: int) -> set[str]:
    """Return who sits round ``round_`` out: after k faults in a row, 2^(k-1) rounds."""
    limit = config.quarantine_after
    return {
        client
        for client, fault in history.faults.items()
        if (limit is None or fault.in_a_row < limit)
        and fault.round < round_ <= fault.round + 2 ** min(fault.in_a_row - 1, _LONGEST_REST)
    }


def _barred(plan: Plan, history: History, round_: int) -> set[str]:
    """Return who owes an answer, is quarantined, or has no round left that its noise is for."""
    barred = {*history.pending, *quarantined(plan.config, history)}
    if plan.config.privacy is not None and plan.max_participations < plan.config.rounds:
        limit = plan.max_participations
        barred |= {c for c, t in history.asked.items() if t.rounds >= limit and t.last != round_}
    return barred
