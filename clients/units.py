"""What a unit with several examples adds to a step: one gradient, the mean of its examples' own.

A unit is whoever a column names. Its examples' gradients become one before anything is clipped, so
that the clip bounds the unit, and one that is there or not moves a step's sum by the bound at most,
however many of its examples took part (user-level DP-SGD; per-user averaging as in 2407.07737).
The examples of a unit are therefore never in two microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clients.samples import Dense, Factored, Samples

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class OfUnits(Generic[Batch]):
    """A microbatch of whole units.

    Attributes:
        batch: their examples, those of one unit next to each other.
        sizes: how many examples each unit has in it, >= 1, in the order of the batch.
    """

    batch: Batch
    sizes: Sequence[int]


def packed(
    drawn: Sequence[Sequence[int]], lengths: Mapping[int, int], size: int
) -> Iterator[list[Sequence[int]]]:
    """Yield the units of a step in parts of at most ``size`` examples and of like length.

    Args:
        drawn: the indices of each unit's examples; none is empty.
        lengths: of these examples, by index.
        size: a unit that has more examples than that is a part by itself.
    """
    part: list[Sequence[int]] = []
    held = 0
    for unit in sorted(drawn, key=lambda indices: max(lengths[i] for i in indices)):
        if part and held + len(unit) > size:
            yield part
            part, held = [], 0
        part.append(unit)
        held += len(unit)
    if part:
        yield part


def of_units(samples: Samples, sizes: Sequence[int]) -> Samples:
    """Return each unit's gradient of one parameter, the mean of its examples'.

    Args:
        samples: of the examples of a microbatch, those of one unit next to each other.
        sizes: how many each unit has, >= 1.

    Returns:
        As many gradients as there are units. Never formed where ``samples`` are not and it would
        cost more memory: the positions of a unit's examples are then its positions.
    """
    if max(sizes) == 1:
        return samples
    if isinstance(samples, Factored):
        positions, narrow = samples.inputs.shape[1:]
        wide = samples.outputs.shape[2]
        if max(sizes) * positions * (narrow + wide) < narrow * wide:
            means = samples.outputs * _shares(sizes, samples.outputs)
            return Factored(_joined(samples.inputs, sizes), _joined(means, sizes))
    gradients = samples.dense()
    counts = torch.tensor(sizes, device=gradients.device)
    owners = torch.arange(len(sizes), device=gradients.device).repeat_interleave(counts)
    total = gradients.new_zeros(len(sizes), *gradients.shape[1:])
    return Dense(total.index_add_(0, owners, gradients * _shares(sizes, gradients)))


def _shares(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return what each example counts in its unit's mean, ``[examples, 1, ...]``."""
    shares = torch.tensor([1 / size for size in sizes for _ in range(size)])
    return shares.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def _joined(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return ``[units, most * positions, features]``, the positions of a unit's examples in a row.

    Units with fewer examples have zeros in place of the others.
    """
    units = [unit.flatten(0, 1) for unit in torch.split(values, list(sizes))]
    return pad_sequence(units, batch_first=True)
