"""Many adapters in one basis: the principal directions of all, and a small core for each.

Source: arXiv 2502.04700; with a core between both bases, ``b core a``, as in
:mod:`strategies.eigenlorax`. T adapters of rank r take ``T r (out + in)`` numbers a layer by
themselves, and ``k (out + in) + T k²`` in a basis of k directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.subspaces import Subspace, balanced, extended, nothing
from strategies.tensors import lora_tensors
from strategies.terms import Term, merged_factors


@dataclass(frozen=True, slots=True)
class SharedLayer:
    """One layer of several adapters: adapter i's product is ``b @ cores[i] @ a`` and what is lost.

    Attributes:
        b: ``[out, p]``, orthonormal columns.
        a: ``[q, in]``, orthonormal rows.
        cores: ``[p, q]``, by number of the adapter; scalings are in it.
    """

    b: Tensor
    a: Tensor
    cores: Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class InOneBasis:
    """Several adapters in one basis.

    Attributes:
        layers: by name.
        metrics: ``captured_energy``, ``captured_energy/LAYER`` and ``captured_energy_of/N``, the
            shares of the squared norms of all, of a layer and of adapter N that are kept.
    """

    layers: Mapping[str, SharedLayer]
    metrics: Mapping[str, float]

    def member(self, adapter: int, terms: Mapping[str, Sequence[Term]]) -> dict[str, Tensor]:
        """Return one adapter again, without its weight, of scaling 1.

        Args:
            adapter: its number.
            terms: as they were given to :func:`share`.
        """
        return lora_tensors(
            {
                name: merged_factors(one.b @ one.cores[adapter], one.a, terms[name])
                for name, one in self.layers.items()
                if adapter in one.cores
            }
        )


def share(
    layers: Mapping[str, Sequence[Term]], rank: int | None = None, energy: float | None = None
) -> InOneBasis:
    """Return the basis of several adapters, and each adapter in it. Weights take no part.

    Args:
        layers: as :func:`strategies.terms.merge_terms` returns them.
        rank: most directions of each side, >= 1; None, without ``energy``, is the largest rank that
            an adapter has in the layer.
        energy: the share of the squared singular values to keep, of columns and of rows.
    """
    found: dict[str, SharedLayer] = {}
    kept: dict[tuple[str, int], tuple[float, float]] = {}
    for name, terms in layers.items():
        limit = rank or (max(len(t.factors.a) for t in terms) if energy is None else None)
        columns, rows = zip(*(balanced(term.factors) for term in terms), strict=True)
        up, down = (_basis(torch.cat(side, dim=1), limit, energy) for side in (columns, rows))
        cores = {}
        for term, left, right in zip(terms, columns, rows, strict=True):
            cores[term.adapter] = (up.T @ left) @ (right.T @ down)
            whole = float(left.square().sum(0).square().sum())  # squared singular values
            kept[name, term.adapter] = float(cores[term.adapter].square().sum()), whole
        found[name] = SharedLayer(up, down.T, cores)
    return InOneBasis(found, _shares(kept))


def _basis(columns: Tensor, limit: int | None, energy: float | None) -> Tensor:
    """Return orthonormal columns, ``[features, k]``, at least one."""
    space: Subspace = extended(nothing(len(columns)), columns)
    count = space.rank_for(energy) if energy is not None and len(space.values) else None
    chosen = [n for n in (limit, count) if n is not None]
    space = space.cut(min(chosen)) if chosen else space
    if space.basis.shape[1]:
        return space.basis
    return torch.eye(len(columns), 1, dtype=torch.float64)  # of zeros, any direction is right


def _shares(kept: Mapping[tuple[str, int], tuple[float, float]]) -> dict[str, float]:
    def of(chosen: Sequence[tuple[float, float]]) -> float:
        total = sum(whole for _, whole in chosen)
        return min(1.0, sum(part for part, _ in chosen) / total) if total else 1.0

    names, owners = dict.fromkeys(n for n, _ in kept), sorted({i for _, i in kept})
    shares = {f"captured_energy/{n}": of([p for k, p in kept.items() if k[0] == n]) for n in names}
    members = {
        f"captured_energy_of/{i}": of([p for k, p in kept.items() if k[1] == i]) for i in owners
    }
    return {"captured_energy": of(list(kept.values())), **shares, **members}
