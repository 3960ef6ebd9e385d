"""KaSA's two penalties (2412.06071, eq. 9 to 11): a small diagonal between orthonormal factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from clients.regularizers import Regularizer
from strategies.base import Tensors
from strategies.plugins import Range

_A, _B, _DIAGONAL = ".lora_A.weight", ".lora_B.weight", ".lora_diag"


@dataclass(frozen=True)
class Kasa(Regularizer):
    """Keep KaSA's diagonal small and its factors orthonormal, as singular values and vectors are.

    The sum over layers, as in PEFT: it grows with their number. Only what is trained is penalised.

    Attributes:
        beta: weight of the diagonal's squared norm, >= 0.
        gamma: weight of ``||B^T B - I|| + ||A A^T - I||``, >= 0.
    """

    beta: Annotated[float, Range(0)] = 1e-4
    gamma: Annotated[float, Range(0)] = 1e-3

    acts_on = r".*\.lora_diag"

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return ``beta * sum d^2 + gamma * (||B^T B - I|| + ||A A^T - I||)``, summed over layers.

        None where no diagonal is trained.
        """
        terms: list[Tensor] = []
        for layer in sorted(n.removesuffix(_DIAGONAL) for n in params if n.endswith(_DIAGONAL)):
            terms.append(self.beta * params[layer + _DIAGONAL].float().square().sum())
            for name, rows in ((_A, 0), (_B, 1)):
                if layer + name in params:
                    factor = params[layer + name].float()
                    terms.append(self.gamma * _skew(factor if rows == 0 else factor.T))
        return torch.stack(terms).sum() if terms else None


def _skew(rows: Tensor) -> Tensor:
    """Return how far ``rows``, ``[rank, width]``, are from orthonormal: a Frobenius norm."""
    away = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    norm: Tensor = torch.linalg.matrix_norm(away)
    return norm
