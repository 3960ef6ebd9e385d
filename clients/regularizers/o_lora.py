"""O-LoRA (2310.14152): every task learns in a subspace orthogonal to those of the tasks before.

Where this differs from the official code (cmnfriend/O-LoRA): the memory keeps an orthonormal basis
of the earlier A's rows instead of the rows themselves. What is orthogonal to one is orthogonal to
the other, but the basis has no scale, does not grow when a task revisits a direction, and a server
that refactors A (FedSVD) leaves its span as it is. The official L2 term on the new factors is an
optimizer's weight decay here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from clients.regularizers import Regularizer
from strategies.base import Tensors
from strategies.plugins import Range

_FACTOR = ".lora_A.weight"
_SUBSPACE = ".subspace"
_NEW_DIRECTION = 1e-5  # relative to A's norm: what is less is float32 rounding, not a direction
_WELL_CONDITIONED = 1e-3  # of the projected A: below it, its rows no longer span `rank` dimensions


class SubspaceFull(ValueError):
    """Earlier tasks leave fewer directions than the new adapter's rank."""


@dataclass(frozen=True)
class OLoRA(Regularizer):
    """New tasks learn orthogonally to the subspaces of earlier ones.

    The soft form penalises the overlap of the trained A with the memory. The hard form starts A in
    the orthogonal complement of the memory and needs it frozen there (FFA-LoRA, FedSVD): then the
    overlap is zero exactly, whatever the data. On a first task both do nothing but remember it.

    Attributes:
        form: ``soft`` or ``hard``.
        weight: strength of the soft penalty, >= 0; 0 turns it off. 0.5 is the paper's.
        reduction: ``sum`` over layers and entries is the official penalty, which grows with the
            number of layers, the rank and the number of tasks; ``mean`` does not.
    """

    form: Literal["soft", "hard"] = "soft"
    weight: Annotated[float, Range(0)] = 0.5
    reduction: Literal["sum", "mean"] = "sum"

    whole_factors: ClassVar[bool] = True
    starts: ClassVar[str] = "stack"

    @property
    def acts_on(self) -> str:  # type: ignore[override]  # a class constant elsewhere; here the form decides
        """Names that must be trained for this to do something: A for soft, anything for hard."""
        return r".*\.lora_A\..*" if self.form == "soft" else ".*"

    @property
    def freezes(self) -> str:  # type: ignore[override]  # read-only here, for the same reason
        """Names that must stay frozen: A, in the hard form."""
        return r".*\.lora_A\..*" if self.form == "hard" else ""

    def initialise(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the adapter with every A in the orthogonal complement of the memory (hard form).

        A's rows become the orthonormal rows nearest to their projection, and keep their norms.

        Raises:
            SubspaceFull: if the complement of a layer has fewer dimensions than A has rows.
        """
        if self.form == "soft":
            return adapter
        moved = {
            name: _in_complement(name, adapter[name], memory[subspace])
            for name in _factors(adapter)
            if (subspace := _subspace_name(name)) in memory
        }
        return {**adapter, **moved}

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``weight * sum |memory @ A^T|``; 0 exactly where all rows are orthogonal.

        None in the hard form, on a first task, and where no A is trained.
        """
        names = [name for name in _factors(params) if _subspace_name(name) in memory]
        if self.form == "hard" or self.weight == 0 or not names:
            return None
        overlaps = [
            (memory[_subspace_name(name)].float() @ params[name].float().T).abs().flatten()
            for name in names
        ]
        entries = torch.cat(overlaps)
        return self.weight * (entries.sum() if self.reduction == "sum" else entries.mean())

    def consolidate(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return the memory with the directions of every A that it does not hold yet.

        ``LAYER.subspace``: ``[known, in_features]`` float32, orthonormal rows; earlier rows stay
        as they are.
        """
        grown = dict(memory)
        for name in _factors(params):
            key = _subspace_name(name)
            grown[key] = _with_directions(params[name], memory.get(key))
        return grown


def _factors(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in tensors if name.endswith(_FACTOR))


def _subspace_name(factor: str) -> str:
    return factor.removesuffix(_FACTOR) + _SUBSPACE


def _outside(rows: Tensor, basis: Tensor) -> Tensor:
    """Return ``rows`` without their part in the span of ``basis``, whose rows are orthonormal."""
    for _ in range(2):  # once more, because the first pass leaves rounding errors in the span
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _in_complement(name: str, factor: Tensor, subspace: Tensor) -> Tensor:
    rank, width = factor.shape
    known = subspace.shape[0]
    if width - known < rank:
        raise SubspaceFull(
            f"{name.removesuffix(_FACTOR)} has {width} input dimensions and earlier tasks use "
            f"{known}: {width - known} are left, rank {rank} needs {rank}. Lower the rank, or "
            "merge the earlier tasks and start afresh"
        )
    basis = torch.linalg.qr(subspace.double().T).Q.T  # float32 storage rounded it a little
    rows = _outside(factor.double(), basis)
    u, spectrum, vh = torch.linalg.svd(rows, full_matrices=False)
    if spectrum[-1] < _WELL_CONDITIONED * factor.double().norm():
        # The given A lies in the subspace: the same seed drew it for an earlier task.
        seed = int.from_bytes(hashlib.sha256(f"{name} {known}".encode()).digest()[:7])
        draw = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)).double()
        u, _, vh = torch.linalg.svd(_outside(draw.to(basis.device), basis), full_matrices=False)
    moved: Tensor = factor.double().norm(dim=1, keepdim=True) * (u @ vh)
    return moved.to(factor.dtype)


def _with_directions(factor: Tensor, known: Tensor | None) -> Tensor:
    rows = factor.detach().double()
    kept = rows.new_zeros(0, rows.shape[1]) if known is None else known.to(rows)
    outside = _outside(rows, torch.linalg.qr(kept.T).Q.T)
    _, spectrum, vh = torch.linalg.svd(outside, full_matrices=False)
    fresh = vh[spectrum > _NEW_DIRECTION * rows.norm()]
    return torch.cat([kept, fresh]).float()
