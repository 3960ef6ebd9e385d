"""A new A that is the old one times an r x r matrix: whoever holds the old one need not be sent it.

Both sides compute the product by the same elementwise steps, which IEEE 754 defines to the last
bit, so that a client that turns the A it holds has the server's, bit for bit; no BLAS promises that
of a matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import lora_layers, refactored

ROTATION = "rotation/"
"""Prefix of the auxiliary tensors that took an A to what it is from what it was a round before."""

_ULPS = 4  # of a row's norm: by how much a turned A may differ from the one that is meant


def rotations(tensors: Tensors) -> dict[str, Tensor]:
    """Return the rotations among ``tensors``, by the name of what they turned."""
    prefixed = sorted(name for name in tensors if name.startswith(ROTATION))
    return {name.removeprefix(ROTATION): tensors[name] for name in prefixed}


def rotated(rotation: Tensor, a: Tensor) -> Tensor:
    """Return ``rotation @ a`` in the dtype of ``a``, the same bits on every machine.

    A sum in float64 of elementwise products, in the order of the rows of ``a``, each product and
    each sum rounded by itself. O(rank² in_features).

    Args:
        rotation: ``[rank, rank]``.
        a: ``[rank, in_features]``.

    >>> rotated(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    tensor([[5., 7.],
            [2., 6.]])
    """
    turn, rows = rotation.double(), a.double()
    total = torch.zeros_like(rows)
    for k in range(rows.shape[0]):
        product = turn[:, k, None] * rows[k]  # by itself: a fused multiply-add rounds once
        total = total + product
    return total.to(a.dtype)


def turned(adapter: Tensors, row_norm: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ``adapter`` refactored, and the rotations that take its old A to the new one.

    The same as :func:`strategies.tensors.refactored` but for rounding. The rotation undoes what the
    old A lacks of orthonormality, so that rounding does not add up over rounds. Where it does not
    lead to the A that is meant (the old one is too close to a lower rank), the layer has none, and
    A is the refactored one itself.

    Args:
        adapter: with low-rank layers.
        row_norm: norm of the rows of the new A, > 0.

    Returns:
        The adapter; and by the name of each A that was turned, ``[rank, rank]`` in float64.

    Raises:
        NotLowRank: as :func:`strategies.tensors.lora_layers`.
    """
    found = dict(refactored(adapter, row_norm))
    turns: dict[str, Tensor] = {}
    for layer, old in lora_layers(adapter).items():
        name = f"{layer}.lora_A.weight"
        new = found[name].double()
        turn = _turn(old.a.double(), new)
        candidate = rotated(turn, old.a)
        allowed = _ULPS * torch.finfo(old.a.dtype).eps * row_norm
        if float((candidate.double() - new).abs().max()) <= allowed:
            found[name], turns[name] = candidate, turn
    return found, turns


def _turn(old: Tensor, new: Tensor) -> Tensor:
    """Return ``[rank, rank]`` that takes ``old`` to ``new``; not finite where nothing does."""
    if old.shape[0] > old.shape[1]:
        return old.new_full((old.shape[0], old.shape[0]), float("nan"))
    q, r = torch.linalg.qr(old.T)  # turn @ r.T = new @ q
    turn: Tensor = torch.linalg.solve_triangular(r.T, new @ q, upper=False, left=False)
    return turn.contiguous()
