"""Spaces of a layer's inputs: which directions tasks use, and which they leave free.

Source: Gradient projection memory, arXiv 2103.09762, eq. 5 to 9, and its dual form of InfLoRA,
arXiv 2404.00228, section 3.3. What a task puts into a layer is known by its second moments, the sum
of ``x x^T`` over all positions: the principal directions of the inputs are its eigenvectors, and
what of them lies in a space is a trace. The sum of the clients' is that of all their data. Nothing
else of anybody's inputs is sent, and nothing of it is private.

Memory holds for each layer an orthonormal basis, as rows, of the directions that earlier tasks use
(``LAYER.used``), or, once those are more than half of all, of the directions that they leave free
(``LAYER.free``): never more than half of the layer's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from strategies.base import Tensors, Update

A, MOMENTS, USED, FREE = ".lora_A.weight", ".moments", ".used", ".free"
_ROUNDING = 1e-7  # relative to all energy, of float32 sums: what is less is no direction


class NoFreeDirection(ValueError):
    """Earlier tasks leave fewer directions than the new adapter's rank."""


def layers_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of an adapter's low-rank layers, sorted."""
    return sorted(name.removesuffix(A) for name in tensors if name.endswith(A))


def summed(inputs: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of ``x x^T`` over all that enters each layer: ``LAYER.moments``, float32.

    Args:
        inputs: batch by batch and layer by layer, ``[positions, in_features]``.
    """
    sums: dict[str, Tensor] = {}
    for batch in inputs:
        for layer, rows in batch.items():
            x = rows.double()
            added = x.T @ x
            sums[layer] = added if layer not in sums else sums[layer] + added
    return {layer + MOMENTS: total.float() for layer, total in sums.items()}


def shapes(params: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what :func:`summed` makes for an adapter."""
    widths = {layer: params[layer + A].shape[1] for layer in layers_of(params)}
    return {layer + MOMENTS: (width, width) for layer, width in widths.items()}


def total(updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return the second moments of all clients' inputs by layer, float64; read once, in order."""
    sums: dict[str, Tensor] = {}
    for update in updates:
        for name, part in update.tensors.items():
            layer, own = name.removesuffix(MOMENTS), part.double()
            sums[layer] = own if layer not in sums else sums[layer] + own
    return {layer: (one + one.T) / 2 for layer, one in sums.items()}


def outside(layer: str, rows: Tensor, memory: Tensors) -> Tensor:
    """Return ``rows``, ``[n, in]``, without what lies in directions that earlier tasks use."""
    wide = rows.double()
    if layer + FREE in memory:
        free = memory[layer + FREE].to(wide)
        wide = (wide @ free.T) @ free
    elif layer + USED in memory:
        used = memory[layer + USED].to(wide)
        for _ in range(2):  # the first pass leaves rounding errors in the space
            wide = wide - (wide @ used.T) @ used
    found: Tensor = wide.to(rows.dtype)
    return found


def free_directions(layer: str, width: int, memory: Tensors) -> Tensor:
    """Return an orthonormal basis of what earlier tasks leave free, ``[k, in]``, float64."""
    if layer + FREE in memory:
        return memory[layer + FREE].double()
    used = memory.get(layer + USED)
    if used is None or not len(used):
        return torch.eye(width, dtype=torch.float64, device=None if used is None else used.device)
    q = torch.linalg.qr(used.double().T, mode="complete").Q
    free: Tensor = q[:, len(used) :].T.contiguous()
    return free


def leading_free(layer: str, moments: Tensor, rank: int, memory: Tensors) -> Tensor:
    """Return the free directions that a task uses most, ``[rank, in]``, orthonormal rows, float64.

    The entry of largest magnitude of each row is positive.

    Args:
        layer: its name.
        moments: of the task's inputs, ``[in, in]``.
        rank: how many.
        memory: of the tasks before.

    Raises:
        NoFreeDirection: if there are not as many.
    """
    free = free_directions(layer, len(moments), memory)
    refuse_full(layer, len(moments), len(free), rank)
    _, vectors = torch.linalg.eigh(free @ moments.double() @ free.T)
    rows: Tensor = vectors.flip(1)[:, :rank].T @ free
    peaks = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * torch.where(peaks < 0, -1.0, 1.0)


def refuse_full(layer: str, width: int, free: int, rank: int) -> None:
    """Refuse a rank for which earlier tasks leave no place.

    Raises:
        NoFreeDirection: if they do not.
    """
    if free < rank:
        raise NoFreeDirection(
            f"{layer} has {width} input dimensions and earlier tasks use {width - free}: {free} "
            f"are left, rank {rank} needs {rank}. Lower the rank or the threshold, or merge the "
            "earlier tasks and start afresh"
        )


def with_task(layer: str, moments: Tensor, energy: float, memory: Tensors) -> dict[str, Tensor]:
    """Return a layer's memory with the directions that a task uses, beside those it has.

    As few are added, the strongest first, as make the space hold the share ``energy`` of the task's
    squared inputs: eq. 9 of 2103.09762.

    Args:
        layer: its name.
        moments: of the task's inputs, ``[in, in]``.
        energy: in (0, 1].
        memory: of the tasks before.

    Returns:
        ``LAYER.used`` or ``LAYER.free``, float32, with at most half as many rows as the layer has
        inputs.
    """
    width = len(moments)
    free = free_directions(layer, width, memory)
    every = float(torch.trace(moments))
    values, vectors = torch.linalg.eigh(free @ moments.double() @ free.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    missing = values.sum() - values.cumsum(0)  # what would still be outside after so many
    outside_allowed = (1 - energy) * every
    count = 0
    if every > 0 and float(values.sum()) > outside_allowed + _ROUNDING * every:
        count = int((missing > outside_allowed + _ROUNDING * every).sum()) + 1
    left = vectors[:, count:].T @ free
    if 2 * len(left) < width:
        return {layer + FREE: left.float()}
    taken = vectors[:, :count].T @ free
    known = memory.get(layer + USED)
    before = taken.new_zeros(0, width) if known is None else known.double()
    return {layer + USED: torch.cat([before, taken]).float()}
