"""Principal subspaces of low-rank adapters: found, extended, and completed to a rank.

Source: arXiv 2502.04700, and for the update of a basis arXiv 2602.06043. An adapter's factors are
its own choice, since ``(B G^-1)(G A)`` is the same product. So a product is first written in the
one way in which both factors weigh alike: singular vectors times the roots of singular values. The
columns of all adapters together then have left singular vectors, and the first of them are the
subspace. Nothing is subtracted: the authors' code takes the mean of the columns away, and neither
keeps nor adds it, so that an adapter is rebuilt exactly only by chance. Uncentred, every adapter
lies in the span of enough columns. All in float64, and no product is formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.tensors import Factors, factored_svd


class Subspace(NamedTuple):
    """Directions that columns share, the strongest first.

    Attributes:
        basis: ``[features, k]``, orthonormal columns; the entry of largest magnitude of each is
            positive.
        values: ``[k]``, the columns' singular values, descending and > 0.
        lost: sum of the squares of the singular values that were cut off, >= 0.
    """

    basis: Tensor
    values: Tensor
    lost: float = 0.0

    @property
    def kept(self) -> float:
        """Sum of the squared singular values."""
        return float(self.values.square().sum())

    def cut(self, rank: int) -> Subspace:
        """Return the first ``rank`` directions, >= 0, or all if there are fewer."""
        lost = self.lost + float(self.values[rank:].square().sum())
        return Subspace(self.basis[:, :rank], self.values[:rank], lost)

    def rank_for(self, energy: float) -> int:
        """Return how many directions keep a share ``energy``, in (0, 1], of all squared values.

        All of them where what was cut off before leaves less.

        >>> Subspace(torch.eye(2), torch.tensor([3.0, 1.0])).rank_for(0.9)
        1
        """
        kept = self.values.square().cumsum(0)
        enough = int((kept < energy * (self.kept + self.lost)).sum()) + 1
        return min(enough, len(self.values))


def nothing(features: int) -> Subspace:
    """Return the subspace of no column.

    >>> nothing(3).basis.shape
    torch.Size([3, 0])
    """
    empty = torch.zeros(features, 0, dtype=torch.float64)
    return Subspace(empty, empty[0])


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return a product's columns and rows in the gauge in which both weigh alike.

    Returns:
        With ``u diag(s) v = scaling * b @ a`` and ``k`` singular values that are not zero:
        ``u sqrt(s)``, ``[out, k]``, and ``v.T sqrt(s)``, ``[in, k]``.
    """
    u, s, vh = factored_svd(factors.b.double() * factors.scaling.double(), factors.a)
    k = int((s > 0).sum())
    root = s[:k].sqrt()
    return u[:, :k] * root, vh[:k].T * root


def extended(space: Subspace, columns: Tensor, rank: int | None = None) -> Subspace:
    """Return the subspace of what ``space`` stands for and new columns together.

    Exact as long as nothing was cut off before: then it is the one of all columns at once. Costs
    ``O(features (k + m)²)`` for ``m`` new columns, however many came before.

    Args:
        space: of the columns before; see :func:`nothing`.
        columns: ``[features, m]``.
        rank: how many directions to keep at most, >= 0; None for all that are not zero.
    """
    known = space.basis * space.values
    q, r = torch.linalg.qr(torch.cat([known, columns.to(torch.float64)], dim=1))
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    rounding = max(r.shape) * torch.finfo(r.dtype).eps * float(r.norm())
    there = int((s > rounding).sum())
    k = there if rank is None else min(there, rank)
    return Subspace(_signed(q @ u[:, :k]), s[:k], space.lost + float(s[k:].square().sum()))


def completed(basis: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return ``basis`` with random directions after it, orthonormal, ``[features, rank]``.

    Args:
        basis: ``[features, k]``, orthonormal columns, ``k <= rank <= features``.
        rank: number of columns.
        generator: of what is drawn: uniform among the directions orthogonal to ``basis``.
    """
    features, k = basis.shape
    drawn = torch.randn(features, rank - k, generator=generator, dtype=basis.dtype)
    q, _ = torch.linalg.qr(torch.cat([basis, drawn], dim=1))
    return torch.cat([basis, _signed(q[:, k:])], dim=1)


def _signed(basis: Tensor) -> Tensor:
    """Return the columns with the signs that make their largest entries positive."""
    if not basis.numel():
        return basis
    peaks = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(peaks < 0, -1.0, 1.0)
