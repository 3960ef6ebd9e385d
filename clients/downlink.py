"""A broadcast without what its client holds of the one before, and whole again: the same bits.

Tensors are known by ``PART/NAME`` (``tensors``, ``mask``, ``extra``) and by digests of what they
hold. One that is left out is the one that the client kept under that name, or that one turned by
the matrices that came in its place (:mod:`strategies.turning`); its digest proves it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from clients.assignment import Assignment
from clients.digests import tensor_digest
from clients.site import Site
from strategies.base import Broadcast, Tensors
from strategies.turning import ROTATION, rotated

DIGEST_BYTES = 32
"""What naming a tensor that is left out costs, as it is counted."""

_PARTS = ("tensors", "mask", "extra")


class NotHeld(LookupError):
    """The client does not hold what was left out of its broadcast; it needs the whole."""


def flattened(sent: Broadcast) -> dict[str, Tensor]:
    """Return all tensors of a broadcast by ``PART/NAME``."""
    return {f"{part}/{name}": t for part in _PARTS for name, t in getattr(sent, part).items()}


def digests(sent: Broadcast) -> dict[str, str]:
    """Return the digest of each tensor of a broadcast, by ``PART/NAME``."""
    return {name: tensor_digest(tensor) for name, tensor in flattened(sent).items()}


def without(sent: Broadcast, held: Collection[str], turns: Tensors) -> Broadcast:
    """Return a broadcast without what its client holds.

    Args:
        sent: the whole.
        held: what is left out, by ``PART/NAME``.
        turns: by ``PART/NAME`` of what is left out and not as the client holds it: the matrices
            that turn it in order, ``[count, rank, rank]``.
    """
    left = {name: t for name, t in flattened(sent).items() if name not in held}
    return _with(sent, {**left, **{f"extra/{ROTATION}{name}": t for name, t in turns.items()}})


def expanded(assignment: Assignment) -> Assignment:
    """Return an assignment with its whole broadcast, which the client keeps for the next.

    One that keeps nothing is returned as it is. Nothing is kept of one that cannot be expanded.

    Raises:
        NotHeld: if the client does not hold what was left out, or it is not what is meant.
    """
    if assignment.held is None:
        return assignment
    site, run, client = Site(assignment.site), assignment.run, assignment.client
    whole = flattened(assignment.broadcast)
    if assignment.held:
        turns = {n: whole.pop(f"extra/{ROTATION}{n}", None) for n in assignment.held}
        kept = site.broadcast(run, client)
        for name, digest in sorted(assignment.held.items()):
            whole[name] = _meant(name, kept.get(name), turns[name], digest)
    site.store_broadcast(run, client, whole)
    return replace(assignment, broadcast=_with(assignment.broadcast, whole), held=None)


def _meant(name: str, kept: Tensor | None, turns: Tensor | None, digest: str) -> Tensor:
    """Return the tensor with this digest: what was kept, or that turned.

    Raises:
        NotHeld: if neither has it.
    """
    if kept is None:
        raise NotHeld(f"the client holds no {name!r}, which was left out; send it whole")
    if tensor_digest(kept) == digest:  # also where a try before this one turned it already
        return kept
    if turns is not None and _fits(turns, kept):
        for turn in turns:
            kept = rotated(turn, kept)
        if tensor_digest(kept) == digest:
            return kept
    raise NotHeld(f"the client's {name!r} is not the one that was left out; send it whole")


def _fits(turns: Tensor, kept: Tensor) -> bool:
    rank = kept.shape[0] if kept.dim() == 2 and kept.is_floating_point() else None
    return turns.dim() == 3 and turns.is_floating_point() and turns.shape[1:] == (rank, rank)


def _with(sent: Broadcast, tensors: Tensors) -> Broadcast:
    """Return a broadcast with other tensors, which are given by ``PART/NAME``."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        parts[part][own] = tensor
    return Broadcast(trainable=sent.trainable, personal=sent.personal, **parts)
