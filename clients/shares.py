"""A client's half of client-level DP: its change is bounded, and may get a share of the noise.

With shares nobody makes the noise of a round's sum alone. Each client adds to its clipped change a
normal of the sum's variance over a number of shares, and any so many clients' shares are the whole
noise: the sum is private however it is formed, also where nobody sees anything else
(arXiv 2102.06387, section 1, with Gaussians). What travels is whole multiples of a grid that
everybody knows, int32, of which the sum is exact: what an aggregation under encryption or masks
adds up. Rounding floats to where they were sent from would be a function of each change, and the
noise of one share does not hide that.

A sum of rounded normals is no rounded sum of normals. Its probabilities are those of the normal sum
with some uniform numbers added, read at whole numbers, up to exp(-pi² s²) where s is one share's
standard deviation in steps of the grid (2102.06387, section 3.3, for discrete Gaussians): at least
16 here, and in a run mostly thousands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.noise import MARGIN, NoiseStream, grid_of
from clients.session import returned_names
from clients.site import Site
from strategies.base import Tensors
from strategies.bounded import clipped_change, shortened
from strategies.uplink import BadEncoding

_FINENESS = 2.0**-12  # rounding a change to the grid is an eighth of what the margin pays for
_STEPS = 16.0  # of the grid in one standard deviation of a share, at least
_FAR = 10.0  # standard deviations; no normal of the stream is as far out
_CHANCE = 8.0  # a normal vector is this much longer than its root mean square once in 1e14 times


class NoiseTooFine(ValueError):
    """A share does not fit into whole numbers of 32 bits."""


def bounded(trained: Tensors, asked: Assignment, site: Site) -> dict[str, Tensor]:
    """Return what a client sends of what it trained, under client-level DP.

    Args:
        trained: the tensors that the update carries.
        asked: with ``central``.
        site: where the client's key is.

    Raises:
        NoiseTooFine: see :func:`grid`.
    """
    assert asked.central is not None
    sent, part = asked.broadcast, asked.noise_share
    if part is None:
        return shortened(trained, sent.tensors, asked.central.bound)
    key = site.run_key(asked.run, asked.client, part.insecure_seed)
    return with_share(trained, asked, NoiseStream(key, asked.digest()))


def with_share(
    trained: Tensors, asked: Assignment, stream: NoiseStream | None
) -> dict[str, Tensor]:
    """Return a client's clipped change with its share of the noise: int32 multiples of the grid.

    Entries that a mask leaves out of training are zero.

    Args:
        trained: the tensors that the update carries.
        asked: with ``noise_share``.
        stream: of the client's secret and this assignment; None adds no noise, for an attack.

    Raises:
        NoiseTooFine: see :func:`grid`.
    """
    assert asked.central is not None
    sent, step, found = asked.broadcast, grid(asked), {}
    changes = clipped_change(trained, sent.tensors, sent.mask, asked.central.clip)
    for name, change in sorted(changes.items()):
        counts = (change.cpu() / step).round()
        if stream is not None:
            normals = stream.normal(f"noise share/{name}", asked.round, change.shape)
            noise = (_deviation(asked) * normals / step).round()
            mask = sent.mask.get(name)
            counts += noise if mask is None else torch.where(mask.cpu() != 0, noise, 0.0)
        found[name] = counts.to(torch.int32)
    return found


def grid(asked: Assignment) -> float:
    """Return what a one in an update stands for: a power of two.

    Args:
        asked: with ``noise_share``.

    Raises:
        NoiseTooFine: if a share would not fit: so much noise, in so many numbers, teaches nothing.
    """
    assert asked.central is not None
    names, clip = returned_names(asked), asked.central.clip
    size = sum(asked.broadcast.tensors[name].numel() for name in names)
    step = grid_of(min(clip, _deviation(asked) / (_STEPS * _FINENESS)), size, _FINENESS)
    largest = (clip + _FAR * _deviation(asked)) / step
    if largest >= 2**31:
        raise NoiseTooFine(
            f"a share of the noise for {size} numbers reaches {largest:.3g} steps of its grid, and "
            "32 bits hold 2.1e9; lower the noise, train fewer numbers, or leave noise_shares out"
        )
    return step


def longest(asked: Assignment) -> float:
    """Return the norm that a clipped change with a share of the noise stays below.

    But once in 1e14 times, so that what is refused for it tells nothing of anybody's data.

    Args:
        asked: with ``noise_share``.
    """
    assert asked.central is not None
    size = sum(asked.broadcast.tensors[name].numel() for name in returned_names(asked))
    return asked.central.clip * MARGIN + _deviation(asked) * (math.sqrt(size) + _CHANCE)


def counted(tensors: Tensors, asked: Assignment) -> dict[str, Tensor]:
    """Return the multiples of the grid that a client sent, whole: int64.

    Args:
        tensors: what came; of a tensor with a mask the values on it, in one dimension.
        asked: with ``noise_share``.

    Raises:
        BadEncoding: if they are not what was asked for.
    """
    found = {}
    for name, values in sorted(tensors.items()):
        if name not in asked.broadcast.tensors:
            raise BadEncoding(f"{name} is not asked for")
        like, mask = asked.broadcast.tensors[name], asked.broadcast.mask.get(name)
        shape = like.shape if mask is None else torch.Size([int((mask != 0).sum())])
        if values.dtype != torch.int32 or values.shape != shape:
            raise BadEncoding(
                f"{name} is {values.dtype} {list(values.shape)}, and with noise_shares it travels "
                f"as torch.int32 {list(shape)}"
            )
        whole = values.to(torch.int64)
        if mask is not None:
            empty = torch.zeros(like.shape, dtype=torch.int64)
            whole = empty.masked_scatter(mask.cpu() != 0, whole)
        found[name] = whole
    return found


def meant(tensors: Tensors, asked: Assignment) -> dict[str, Tensor]:
    """Return the tensors that a client's change and share of the noise make of what it was sent.

    Args:
        tensors: what came.
        asked: with ``noise_share``.

    Raises:
        BadEncoding: if they are not what was asked for, or longer than an honest client's are.
    """
    counts, step, sent = counted(tensors, asked), grid(asked), asked.broadcast.tensors
    norm = math.hypot(*(float((step * c.double()).norm()) for c in counts.values()))
    if norm > longest(asked):
        raise BadEncoding(
            f"its change with a share of the noise has norm {norm:.4g}, and none that is clipped "
            f"to {asked.central.clip if asked.central else 0:g} is longer than {longest(asked):.4g}"
        )
    return {n: (sent[n].double() + step * c.double()).to(sent[n].dtype) for n, c in counts.items()}


def _deviation(asked: Assignment) -> float:
    """Return the standard deviation of one client's noise in every number."""
    assert asked.central is not None
    assert asked.noise_share is not None
    return asked.central.sum_std * MARGIN / math.sqrt(asked.noise_share.of)
