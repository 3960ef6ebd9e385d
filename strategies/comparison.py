"""In what two adapters differ, layer by layer, without forming a product.

Works on the factors in float64, at O((in + out) rank²) a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, NotLowRank, factored_svd, product_norm

_RANK = 1e-5  # of the largest singular value: below it, a float32 factor's direction is rounding


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One low-rank layer of two adapters; one that an adapter has not is a zero product there.

    Attributes:
        layer: its name.
        norms: Frobenius norms of the two products, ``scaling * B A``.
        change: Frobenius norm of the second product minus the first.
        effective_ranks: of the two products, see :func:`effective_rank`.
        input_angles: principal angles in degrees between the two row spaces, ascending; as many as
            the smaller space has dimensions.
        output_angles: the same between the column spaces.
    """

    layer: str
    norms: tuple[float, float]
    change: float
    effective_ranks: tuple[float, float]
    input_angles: tuple[float, ...]
    output_angles: tuple[float, ...]

    @property
    def relative(self) -> float | None:
        """The change over the first norm; None where that is zero."""
        return self.change / self.norms[0] if self.norms[0] else None


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of two adapters that is no low-rank factor, such as a head's.

    Attributes:
        name: its name.
        norms: Euclidean norms; 0 where an adapter has no such tensor.
        change: norm of the difference; None where the shapes differ.
    """

    name: str
    norms: tuple[float, float]
    change: float | None

    @property
    def relative(self) -> float | None:
        """The change over the first norm; None where one of them is not to be had."""
        return None if self.change is None or not self.norms[0] else self.change / self.norms[0]


def compare_layers(
    first: Mapping[str, Factors], second: Mapping[str, Factors]
) -> list[LayerDifference]:
    """Return in what the products of two adapters differ, by layer, sorted.

    Args:
        first: as :func:`strategies.tensors.lora_layers` returns them.
        second: likewise, of the same base model.

    Raises:
        NotLowRank: if a layer has other shapes in one adapter than in the other.
    """
    found = []
    for name in sorted(first.keys() | second.keys()):
        one, other = _scaled(first.get(name)), _scaled(second.get(name))
        if one is None or other is None:
            only = one or other
            assert only is not None  # the name is of one of the two
            one = one or (torch.zeros_like(only[0]), torch.zeros_like(only[1]))
            other = other or (torch.zeros_like(only[0]), torch.zeros_like(only[1]))
        found.append(_layer(name, one, other))
    return found


def compare_tensors(first: Tensors, second: Tensors) -> list[TensorDifference]:
    """Return in what the tensors of two adapters differ, by name, sorted."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        one, other = first.get(name), second.get(name)
        if one is None or other is None or one.shape == other.shape:
            change = _norm(_minus(one, other))
        else:
            change = None
        found.append(TensorDifference(name, (_norm(one), _norm(other)), change))
    return found


def effective_rank(singular: Tensor) -> float:
    """Return how many directions a matrix uses: e to the entropy of its singular values.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007: equal values count fully, small ones
    hardly. 0 for the zero matrix.

    Args:
        singular: ``[k]``, at least 0.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    total = float(singular.sum())
    if total == 0:
        return 0.0
    shares = singular.double() / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the principal angles between two subspaces, in degrees, ascending, in float64.

    By sines where they are small and by cosines where they are large: each alone loses half of its
    digits at one end (Knyazev and Argentati, SIAM J. Sci. Comput. 23(6), 2002, algorithm 3.1).

    Args:
        one: ``[n, p]``, orthonormal columns.
        other: ``[n, q]``, orthonormal columns.

    Returns:
        ``[min(p, q)]``.
    """
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    inner = one.T.double() @ other.double()
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(other.double() - one.double() @ inner).flip(0)
    by_sine = torch.asin(sines.clamp(max=1.0))
    by_cosine = torch.acos(cosines.clamp(max=1.0))
    return torch.rad2deg(torch.where(cosines**2 > 0.5, by_sine, by_cosine))


def _layer(name: str, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> LayerDifference:
    shapes = [[b.shape[0], a.shape[1]] for b, a in (one, other)]
    if shapes[0] != shapes[1]:
        raise NotLowRank(
            f"layer {name!r} is {shapes[0]} in one adapter and {shapes[1]} in the other: they "
            "belong to different base models; compare adapters of one"
        )
    u, s, v = _directions(one)
    u2, s2, v2 = _directions(other)
    change = product_norm(torch.cat([other[0], -one[0]], dim=1), torch.cat([other[1], one[1]]))
    return LayerDifference(
        layer=name,
        norms=(float(s.norm()), float(s2.norm())),
        change=change,
        effective_ranks=(effective_rank(s), effective_rank(s2)),
        input_angles=tuple(principal_angles(v, v2).tolist()),
        output_angles=tuple(principal_angles(u, u2).tolist()),
    )


def _directions(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the left vectors, all singular values, and the right vectors; columns that count."""
    u, s, vh = factored_svd(*factors)
    rank = int((s > _RANK * s[:1]).sum())
    return u[:, :rank], s, vh[:rank].T


def _scaled(factors: Factors | None) -> tuple[Tensor, Tensor] | None:
    if factors is None:
        return None
    return factors.b.double() * factors.scaling.double(), factors.a.double()


def _minus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return other.double() - one.double()


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(torch.linalg.vector_norm(tensor.double()))
