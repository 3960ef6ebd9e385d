"""N-LoRA (2410.10179): a task changes few entries of the weights, so that tasks collide in fewer.

The penalty is the L1 norm of the change itself, ``|s B A|_1``. The official code
(PKU-YuanGroup/N-LoRA) penalises ``|A B|_1`` instead, a rank x rank matrix that says nothing of the
entries of the change, and exists only where a layer is square; its strengths (0.4 and more) are
none for this. How often tasks still collide is :func:`strategies.collisions.collision_rate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clients.regularizers import Regularizer
from strategies.base import Tensors
from strategies.plugins import Range

_A, _B, _SCALING = ".lora_A.weight", ".lora_B.weight", ".scaling"
_DIAGONAL = ".lora_diag"  # KaSA's
_ENTRIES = 2**22  # of a product that are in memory at once: 16 MB


@dataclass(frozen=True)
class NLoRA(Regularizer):
    """Few entries of the base weights change, so that tasks interfere less.

    Costs the product of the factors of every layer in every step, by blocks of its rows.

    Attributes:
        weight: strength, >= 0; 0 turns it off. It is to be tuned: a sum over all entries grows
            with the model.
        reduction: ``sum`` over all entries of all layers is the paper's norm; ``mean`` is theirs.
    """

    weight: Annotated[float, Range(0)] = 1e-5
    reduction: Literal["sum", "mean"] = "sum"

    acts_on = r".*\.lora_[AB]\.weight"
    whole_factors = True
    starts = "stack"

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``weight * |s B A|_1``; what of a product is frozen is taken from ``reference``.

        None where no factor is trained.
        """
        trained = {n.removesuffix(_A).removesuffix(_B) for n in params if n.endswith((_A, _B))}
        if not trained or self.weight == 0:
            return None
        values, count, known = [], 0, {**reference, **params}
        for layer in sorted(trained):
            b, a = known[layer + _B], known[layer + _A]
            if layer + _DIAGONAL in known:
                b = b * known[layer + _DIAGONAL]
            scaling = reference[layer + _SCALING].to(a.device)
            norm: Tensor = _ProductNorm.apply(b, a)  # type: ignore[no-untyped-call]
            values.append(scaling.abs() * norm)
            count += len(b) * a.shape[1]
        total = torch.stack(values).sum()
        return self.weight * (total if self.reduction == "sum" else total / count)


class _ProductNorm(torch.autograd.Function):
    """The sum of the absolute entries of ``b @ a``, of which a block of rows exists at a time."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor) -> Tensor:
        """Return the norm; ``b`` is ``[out, rank]``, ``a`` ``[rank, in]``."""
        b32, a32 = b.float(), a.float()
        total, of_b, of_a = b32.new_zeros(()), torch.empty_like(b32), torch.zeros_like(a32)
        step = max(1, _ENTRIES // a.shape[1])
        for start in range(0, len(b), step):
            rows = slice(start, start + step)
            product = b32[rows] @ a32
            total += product.abs().sum()
            sign = product.sign_()
            of_b[rows] = sign @ a32.T
            of_a += b32[rows].T @ sign
        ctx.save_for_backward(of_b.to(b.dtype), of_a.to(a.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the subgradients ``sign(b a) a^T`` and ``b^T sign(b a)``; 0 where an entry is."""
        of_b, of_a = ctx.saved_tensors
        return gradients[0] * of_b, gradients[0] * of_a
