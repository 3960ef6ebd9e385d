"""What a client under DP-SGD tells of a round besides its update: its mean loss, in noise.

A report is made as a step of training is: of a Poisson sample at the same rate, every unit adds
something bounded to a sum, which gets Gaussian noise of the same multiplier. So it costs what a
step costs, and is on the ledger as one. The more steps' worth it may cost, the less noise is in it.

A loss is cut off at a bound and told as its distance from the middle, which halves what one example
adds to the sum. What is divided by is how many are expected, never how many were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clients.assignment import Privacy, Report
from clients.noise import MARGIN, NoiseStream, discretised, grid_of

LOSS, COUNT = "loss", "examples"
"""What is told, by name."""

_PURPOSE = "what is told of a round"  # no tensor's name


def names(report: Report | None) -> frozenset[str]:
    """Return what a report tells; nothing without one."""
    if report is None:
        return frozenset()
    return frozenset({LOSS, COUNT} if report.count else {LOSS})


def noised(
    privacy: Privacy,
    stream: NoiseStream,
    first: int,
    expected: float,
    losses: Callable[[int], Tensor],
) -> dict[str, float]:
    """Return what is told of a round; noise is in all of it.

    Args:
        privacy: the client's, with a report.
        stream: of the client's secret and the assignment.
        first: number of the first step that training does not have.
        expected: number of units a step, > 0: the sample rate times the declared size.
        losses: returns the losses of a step's Poisson sample, ``[units]``, by the step's number;
            what is no number counts as the bound.

    Returns:
        The mean loss of the client's data, in [0, bound], and their number, >= 0, if asked for.
    """
    report = privacy.report
    assert report is not None
    # what a unit adds is at most 1 in each number, so together at most their number's root
    deviation = privacy.noise_multiplier * math.sqrt(1 + report.count) * MARGIN
    told = torch.zeros(1 + report.count, dtype=torch.float64)
    for step in range(first, first + report.steps):
        added = _added(losses(step), report)
        noise = deviation * stream.normal(_PURPOSE, step, added.shape)
        told += discretised(added, noise, grid_of(1.0, added.numel()))
    share = float(told[0]) / (expected * report.steps)
    found = {LOSS: min(max(0.5 * report.loss * (1 + share), 0.0), report.loss)}
    if report.count:
        found[COUNT] = max(float(told[1]) / (privacy.sample_rate * report.steps), 0.0)
    return found


def _added(losses: Tensor, report: Report) -> Tensor:
    """Return what a sample adds up to, float64 ``[1]``, or ``[2]`` with the count."""
    cut = losses.double().nan_to_num(nan=report.loss, posinf=report.loss).clamp(0.0, report.loss)
    sums = [(2 * cut / report.loss - 1).clamp(-1.0, 1.0).sum()]
    if report.count:
        sums.append(torch.tensor(float(len(cut)), dtype=torch.float64))
    return torch.stack(sums)
