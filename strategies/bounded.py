"""Client-level differential privacy: changes of bounded norm, and noise in their sum.

Source: arXiv 1710.06963 (DP-FedAvg, the estimator with a fixed denominator), and 1905.03871 for
the adaptive clip (algorithm 1). A client's change is
that of all the tensors it sends, together; it is shortened to a norm, added up with the others',
and the sum gets Gaussian noise and is divided by a number that is known before anybody answers. So
the noise's size tells nothing of how many answered, and who does not answer counts as no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from strategies.base import Tensors, Update
from strategies.spends import ClientLevel
from strategies.tensors import BadUpdate, check_update

_WITHIN = "client-level/within"
"""The name under which the count gets its noise; no tensor has it."""

Noise: TypeAlias = Callable[[str, Tensor, float], Tensor]
"""Returns the total of a name, float64, with normal noise of a standard deviation in it."""


class TooFewShares(RuntimeError):
    """A sum has not the noise that was promised, and may not be told."""


class Noised(NamedTuple):
    """What a round tells of its clients.

    Attributes:
        update: what was sent, and the mean change with noise in it.
        share: of the changes that were within the clip, with noise in it, so perhaps below 0 or
            above 1; who did not answer counts half.
    """

    update: Update
    share: float


def shortened(trained: Tensors, sent: Tensors, clip: float) -> dict[str, Tensor]:
    """Return trained tensors moved back towards what was sent, until their change is within a norm.

    All move by one factor, which keeps the change's direction. A change that is not finite is none:
    whether a client's training diverged is of its data.

    >>> sent = {"x": torch.zeros(1), "y": torch.zeros(1)}
    >>> shortened({"x": torch.tensor([6.0]), "y": torch.tensor([8.0])}, sent, 5.0)
    {'x': tensor([3.]), 'y': tensor([4.])}

    Args:
        trained: what the client trained.
        sent: at least the same tensors, as the client was sent them.
        clip: > 0.
    """
    changes, norm = _change(trained, sent, {})
    if not math.isfinite(norm):
        return {name: sent[name] for name in trained}
    if norm <= clip:
        return dict(trained)
    factor = clip / norm
    return {
        name: (sent[name].to(torch.float64) + factor * change).to(trained[name].dtype)
        for name, change in changes.items()
    }


def noised_mean(
    updates: Iterable[Update], like: Tensors, mask: Tensors, terms: ClientLevel, noise: Noise
) -> Noised:
    """Return the clients as one update: what was sent, and their mean change with noise in it.

    Each change is shortened to ``terms.clip`` first, whoever sent it. All is in float64, and
    rounded once, at the end. Clients count alike, and none may be there twice. One update is kept
    at a time. Of no update at all it is noise.

    Args:
        updates: of one round and base, from different clients.
        like: the tensors that were to be trained, as they were sent.
        mask: 0/1 by tensor, as in :class:`strategies.base.Broadcast`: entries at 0 stay as they
            are, whatever came, and get no noise.
        terms: bound, noise and denominator.
        noise: puts the noise in; what it returns is safe to be told.

    Raises:
        BadUpdate: if an update has other tensors than ``like``, is not finite, or its client is
            there twice.
    """
    sums = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in sorted(like.items())}
    seen: set[str] = set()
    within = 0.0
    for update in updates:
        _refuse_unfit(update, like, seen)
        changes, norm = _change(update.tensors, like, mask)
        if not math.isfinite(norm):
            raise BadUpdate(f"the update of {update.client!r} is not finite; it must be")
        factor = min(1.0, terms.clip / norm) if norm else 1.0
        within += 0.5 if norm <= terms.clip else -0.5
        for name, change in changes.items():
            sums[name].add_(change, alpha=factor)
    tensors = {}
    for name, total in sums.items():
        mean = _masked(noise(name, total, terms.sum_std), mask.get(name)) / terms.cohort
        tensors[name] = (like[name].to(torch.float64) + mean).to(like[name].dtype)
    update = Update(client="", round=0, base="", tensors=tensors, num_examples=1)
    if terms.quantile is None:  # then the count gets no part of the privacy, and is not told
        return Noised(update, math.nan)
    counted = noise(_WITHIN, torch.tensor([within], dtype=torch.float64), terms.count_std)
    return Noised(update, 0.5 + float(counted) / terms.cohort)


def clipped_change(
    trained: Tensors, sent: Tensors, mask: Tensors, clip: float
) -> dict[str, Tensor]:
    """Return a client's change, shortened to a norm: float64, zero where a mask is.

    As :func:`shortened`, before anything is rounded.
    """
    changes, norm = _change(trained, sent, mask)
    if not math.isfinite(norm):
        return {name: torch.zeros_like(change) for name, change in changes.items()}
    factor = min(1.0, clip / norm) if norm else 1.0
    return {name: factor * change for name, change in changes.items()}


def mean_of_shares(
    updates: Iterable[Update], like: Tensors, grid: float, cohort: int, shares: int
) -> Update:
    """Return the clients as one update, where each has put its share of the noise in by itself.

    The sum is of whole numbers, and exact. It has the noise of as many shares as it has updates:
    never less than was promised, and more where more answered.

    Args:
        updates: of one round and base, from different clients; their tensors are changes with
            noise, int64 multiples of ``grid``.
        like: the tensors that were to be trained, as they were sent.
        grid: what a one stands for, > 0.
        cohort: what the sum is divided by, however many answered.
        shares: how many make the noise whole.

    Raises:
        BadUpdate: if an update has other tensors than ``like``, or its client is there twice.
        TooFewShares: if fewer answered. What the server added instead, it would know.
    """
    sums = {n: torch.zeros(t.shape, dtype=torch.int64) for n, t in sorted(like.items())}
    seen: set[str] = set()
    for update in updates:
        _refuse_unfit(update, like, seen)
        for name, counts in update.tensors.items():
            sums[name].add_(counts)
    if len(seen) < shares:
        raise TooFewShares(
            f"{len(seen)} clients' shares are not the whole noise, which {shares} make together; "
            "what the coordinator added in their place would be no secret to it, so nothing is told"
        )
    tensors = {
        name: (like[name].double() + total.double() * grid / cohort).to(like[name].dtype)
        for name, total in sums.items()
    }
    return Update(client="", round=0, base="", tensors=tensors, num_examples=1)


def _refuse_unfit(update: Update, like: Tensors, seen: set[str]) -> None:
    check_update(update, like)
    odd = sorted(like.keys() - update.tensors.keys())
    if odd:
        raise BadUpdate(f"the update of {update.client!r} has no {odd[0]!r}, which was asked for")
    if update.client in seen:
        raise BadUpdate(
            f"{update.client!r} is in one sum twice, and the noise hides one change of each client"
        )
    seen.add(update.client)


def _change(trained: Tensors, sent: Tensors, mask: Tensors) -> tuple[dict[str, Tensor], float]:
    """Return the changes in float64, without what is masked, and the norm of all together."""
    changes = {
        name: _masked(
            trained[name].to(torch.float64) - sent[name].to(torch.float64), mask.get(name)
        )
        for name in sorted(trained)
    }
    return changes, math.hypot(*(float(torch.linalg.vector_norm(t)) for t in changes.values()))


def _masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else torch.where(mask != 0, tensor, 0.0)
