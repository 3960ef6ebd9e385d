"""AdamW (1711.05101), torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from strategies.plugins import Range


def adamw(
    params: Iterable[nn.Parameter],
    lr: Annotated[float, Range(0, open_low=True)] = 1e-3,
    *,
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.9,
    beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.999,
    eps: Annotated[float, Range(0, open_low=True)] = 1e-8,
    weight_decay: Annotated[float, Range(0)] = 0.0,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay.

    Args:
        params: what to train.
        lr: learning rate, > 0.
        beta1: decay of the gradient's running mean, in [0, 1).
        beta2: decay of its running square, in [0, 1).
        eps: added to the square root, > 0.
        weight_decay: per step and unit of ``lr``, >= 0. Torch's default is 0.01; here it is 0,
            because a decayed factor pulls a federated adapter towards the base model every round.
    """
    return torch.optim.AdamW(
        params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay
    )
