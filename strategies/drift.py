"""What is lost where factors are averaged instead of their products.

With weights ``p_k`` that sum to 1 and means ``B`` and ``A``, ``sum p_k B_k A_k - B A`` is the
covariance ``sum p_k (B_k - B)(A_k - A)``: zero where clients differ in one factor only. It is taken
here relative to the adapter that the round began with, so that nothing large cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from strategies.base import Tensors, Update
from strategies.tensors import Factors, NotLowRank, Weighting, lora_layers, product_norm, weight_of

_COLUMNS, _ELEMENTS = 256, 2**19  # what is kept of a layer's updates: so many columns, and 4 MB
_PROBES = 64  # norms of so many random images have a relative error of at most 9 % (1 sigma)
_A, _B = ".lora_A.weight", ".lora_B.weight"


def norm(u: Tensor, v: Tensor) -> float:
    """Return the Frobenius norm of ``u @ v``, which is not formed; see :class:`AveragingError`.

    Args:
        u: ``[out, columns]``, float64.
        v: ``[columns, in]``, float64.
    """
    if v.shape[0] <= _most_columns(u.shape[0], v.shape[1]):
        return product_norm(u, v)
    return float((u @ (v @ _probes(v.shape[1]))).norm())


def _most_columns(out: int, width: int) -> int:
    return min(_COLUMNS, _ELEMENTS // (out + width))


@lru_cache(maxsize=8)  # the widths of a model; drawing them costs as much as using them
def _probes(width: int) -> Tensor:
    """Return ``[width, probes]`` of which the image by a matrix has the matrix's norm on average.

    Always the same: ``E |M w|^2 = |M|^2`` for entries of variance 1.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(width, _PROBES, generator=generator, dtype=torch.float64)
    return drawn / math.sqrt(_PROBES)


def relative(norms: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return errors relative to what they are of, in all and by layer, as metrics.

    >>> relative({"q": (3.0, 5.0), "k": (4.0, 0.0)})
    {'averaging_error': 1.0, 'averaging_error/q': 0.6, 'averaging_error/k': 0.0}

    Args:
        norms: by layer, the norm of what averaging loses and that of the mean product, with their
            scalings.
    """
    if not norms:
        return {}
    total = math.hypot(*(one for one, _ in norms.values()))
    every = math.hypot(*(whole for _, whole in norms.values()))
    found = {"averaging_error": total / every if every else 0.0}
    for name, (one, whole) in norms.items():
        found[f"averaging_error/{name}"] = one / whole if whole else 0.0
    return found


@dataclass(slots=True)
class _Layer:
    """The running sum ``sum w_k (B_k - b)(A_k - a)`` of one layer, in float64."""

    start: Factors
    loose: bool = False
    total: float = 0.0
    sum_b: Tensor | None = None  # of w_k (B_k - b), and of A's; kept where it is loose
    sum_a: Tensor | None = None
    u: list[Tensor] = field(default_factory=list)  # w_k (B_k - b)
    v: list[Tensor] = field(default_factory=list)  # A_k - a
    image: Tensor | None = None  # of the probes, once there are too many columns

    def add(self, weight: float, b: Tensor, a: Tensor) -> None:
        self.total += weight
        self.u.append((b.double() - self.start.b.double()) * weight)
        self.v.append(a.double() - self.start.a.double())
        if self.loose:
            moved = self.v[-1] * weight
            self.sum_b = self.u[-1].clone() if self.sum_b is None else self.sum_b + self.u[-1]
            self.sum_a = moved if self.sum_a is None else self.sum_a + moved

    def fold(self, *, if_full: bool = False) -> None:
        """Forget the sum's factors; keep what it makes of the probes."""
        columns = sum(one.shape[1] for one in self.u)
        out, width = self.start.b.shape[0], self.start.a.shape[1]
        if not columns or (if_full and columns < _most_columns(out, width)):
            return
        # singly precise: these are changes of a round, and the estimate is worse than that
        probes = _probes(width).float()
        image = (torch.cat(self.u, dim=1).float() @ (torch.cat(self.v).float() @ probes)).double()
        self.image = image if self.image is None else self.image + image
        self.u, self.v = [], []

    def deviation(self, mean: Factors) -> tuple[Tensor, Tensor]:
        """Return factors of ``sum p_k B_k A_k - B A``: ``[out, columns]`` and ``[columns, in]``.

        The sum must not have been folded.
        """
        du, dv = mean.b.double() - self.start.b.double(), mean.a.double() - self.start.a.double()
        u = [one / self.total for one in self.u]
        more_u, more_v = self._beside(du, dv)
        return torch.cat([*u, -du, *more_u], dim=1), torch.cat([*self.v, dv, *more_v])

    def _beside(self, du: Tensor, dv: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return factors of what is lost besides, where the factors are not the weighted means."""
        if self.sum_b is None or self.sum_a is None:
            return [], []
        b, a = self.start.b.double(), self.start.a.double()
        return [b, self.sum_b / self.total - du], [self.sum_a / self.total - dv, a]

    def norms(self, mean: Factors) -> tuple[float, float]:
        """Return the norms of the deviation and of the mean product, scaled."""
        scaling = abs(float(mean.scaling))
        b, a = mean.b.double(), mean.a.double()
        if self.image is None:
            u, v = self.deviation(mean)
            whole = norm(torch.cat([u, b], dim=1), torch.cat([v, a]))
            return scaling * norm(u, v), scaling * whole
        self.fold()
        probes = _probes(a.shape[1])
        du, dv = b - self.start.b.double(), a - self.start.a.double()
        lost = self.image / self.total - du @ (dv @ probes)
        for u, v in zip(*self._beside(du, dv), strict=True):
            lost = lost + u @ (v @ probes)
        whole = float((lost + b @ (a @ probes)).norm())
        return scaling * float(lost.norm()), scaling * whole


class AveragingError:
    """Watches a round's updates go by and says what averaging their factors loses.

    Exact while the updates' ranks add up to less than 256 and a layer's changes take less than
    4 MB; beyond that memory stays as it is, and norms are estimated from the images of 64 fixed
    random vectors (a relative standard error of at most 9 %, and much less where many directions
    matter). O((out + in) columns²) a layer in the end, never out x in.

    Args:
        adapter: what the round began with. Layers that are no plain factors are not measured.
        weighting: as in the mean.
        whole: keep all updates' changes, so that :meth:`deviations` can be had.
        loose: the factors that follow need not be the weighted means.
    """

    def __init__(
        self, adapter: Tensors, weighting: Weighting, *, whole: bool = False, loose: bool = False
    ) -> None:
        self._weighting, self._whole = weighting, whole
        try:
            layers = lora_layers(adapter)
        except NotLowRank:
            layers = {}
        self._layers = {name: _Layer(factors, loose) for name, factors in layers.items()}

    def watching(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Yield the updates as they are."""
        for update in updates:
            weight = weight_of(update, self._weighting)
            for name, layer in self._layers.items():
                b, a = update.tensors.get(name + _B), update.tensors.get(name + _A)
                if b is None or a is None or not weight:  # a round may train one of them only
                    continue
                if (b.shape, a.shape) == (layer.start.b.shape, layer.start.a.shape):
                    self.add(name, weight, b, a)
            yield update

    def add(self, name: str, weight: float, b: Tensor, a: Tensor) -> None:
        """Count one client's layer in.

        Args:
            name: of the layer.
            weight: > 0.
            b: ``[out, rank]``.
            a: ``[rank, in]``, of the adapter's rank.
        """
        self._layers[name].add(weight, b, a)
        if not self._whole:
            self._layers[name].fold(if_full=True)

    def metrics(self, mean: Tensors) -> dict[str, float]:
        """Return the error relative to the mean product, in all and by layer; empty for no update.

        ``averaging_error`` is ``|mean(B A) - mean(B) mean(A)| / |mean(B A)|``, Frobenius norms over
        all layers with their scalings; 0 where the mean product is zero.

        Args:
            mean: the adapter with the means of the factors.
        """
        return relative({name: self._layers[name].norms(f) for name, f in self._means(mean)})

    def deviations(self, mean: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what averaging loses, by layer, in factored form and without scaling.

        Returns:
            ``[out, columns]`` and ``[columns, in]``; only with ``whole``.
        """
        return {name: self._layers[name].deviation(factors) for name, factors in self._means(mean)}

    def _means(self, mean: Tensors) -> Iterator[tuple[str, Factors]]:
        seen = [name for name, layer in self._layers.items() if layer.total]
        layers = lora_layers(mean) if seen else {}
        yield from ((name, layers[name]) for name in seen)
