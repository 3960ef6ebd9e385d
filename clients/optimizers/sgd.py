"""Stochastic gradient descent, torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from clients.optimizers.descent import PlainDescent
from strategies.plugins import Range


def sgd(
    params: Iterable[nn.Parameter],
    lr: Annotated[float, Range(0, open_low=True)] = 0.1,
    *,
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.0,
    weight_decay: Annotated[float, Range(0)] = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent, with momentum if wanted.

    Args:
        params: what to train.
        lr: learning rate, > 0.
        momentum: in [0, 1); 0 is plain descent.
        weight_decay: L2 coefficient, >= 0.
        nesterov: look-ahead momentum; needs ``momentum`` > 0.

    Raises:
        ValueError: if ``nesterov`` is asked for without momentum.
    """
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs momentum > 0, got 0; set momentum or leave nesterov out")
    if momentum == 0 and weight_decay == 0:
        return PlainDescent(params, lr=lr)
    return torch.optim.SGD(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )
