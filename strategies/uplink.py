"""What clients send, made smaller: a chain of encodings, and back.

What is encoded is a client's change since the broadcast. Each stage takes named tensors and returns
named tensors, which the next stage takes; the main part of a tensor keeps its name, and what a
stage needs beside it is called ``NAME:WHAT``. Shapes and dtypes of what a chain returns follow from
those of what goes in, so that what a hostile client sends is refused before it is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from strategies.base import Tensors


class BadEncoding(ValueError):
    """Tensors are not what an encoding makes of the tensors that were asked for."""


class Encoding(Protocol):
    """One stage: it takes floating tensors and leaves all others as they are.

    Pure and deterministic in its arguments. Encoding what was decoded gives the same again.

    Attributes:
        last: whether no other stage may follow: what it returns is no number to compute with.
        feedback: whether the client keeps what the stage leaves out, and adds it to what it encodes
            in its next round (arXiv 1809.07599, memory).
    """

    @property
    def last(self) -> bool:
        """See the class."""
        ...

    @property
    def feedback(self) -> bool:
        """See the class."""
        ...

    def layout(self, like: Tensors) -> dict[str, Tensor]:
        """Return names, shapes and dtypes of what :meth:`encode` makes of ``like``, without values.

        Args:
            like: on the ``meta`` device, as is what is returned.
        """
        ...

    def encode(self, tensors: Tensors, seed: int) -> dict[str, Tensor]:
        """Return ``tensors`` encoded.

        Args:
            tensors: finite.
            seed: of what the stage draws; both sides have the same.
        """
        ...

    def decode(self, encoded: Tensors, like: Tensors, seed: int) -> dict[str, Tensor]:
        """Return what was encoded, as far as it is there.

        Args:
            encoded: of the names, shapes and dtypes of :meth:`layout`.
            like: what went in, without values.
            seed: as it was encoded with.

        Raises:
            BadEncoding: if the values are none that :meth:`encode` returns.
        """
        ...


def outline(tensors: Tensors) -> dict[str, Tensor]:
    """Return ``tensors`` without values, as the changes of them that are encoded: at least float32.

    >>> outline({"head.bias": torch.zeros(3, dtype=torch.bfloat16)})["head.bias"].dtype
    torch.float32
    """
    return {
        name: tensor.new_empty(
            tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device="meta"
        )
        for name, tensor in sorted(tensors.items())
    }


def refuse_chain(stages: Sequence[tuple[str, Encoding]]) -> None:
    """Refuse stages after one that must be the last.

    Args:
        stages: names and encodings, in order.

    Raises:
        ValueError: naming both.
    """
    for (name, stage), (after, _) in pairwise(stages):
        if stage.last:
            raise ValueError(
                f"{after!r} cannot follow {name!r}, which leaves no numbers to compute with; put "
                f"{name!r} last"
            )


def layouts(stages: Sequence[Encoding], like: Tensors) -> list[Tensors]:
    """Return ``like`` and what each stage makes of it, all without values.

    Args:
        stages: in order.
        like: an :func:`outline`.
    """
    found = [like]
    for stage in stages:
        found.append(stage.layout(found[-1]))
    return found


def encode(stages: Sequence[Encoding], change: Tensors, seed: int) -> dict[str, Tensor]:
    """Return ``change`` after all stages.

    Args:
        stages: in order.
        change: finite; see :func:`outline` for its dtypes.
        seed: of the client's round.
    """
    encoded = dict(change)
    for place, stage in enumerate(stages):
        encoded = stage.encode(encoded, derived(seed, str(place)))
    return encoded


def decode(
    stages: Sequence[Encoding], encoded: Tensors, like: Tensors, seed: int
) -> dict[str, Tensor]:
    """Return the change that was encoded, as far as it is there.

    Args:
        stages: as it was encoded with.
        encoded: what was sent.
        like: the :func:`outline` of what was asked for.
        seed: of the client's round.

    Raises:
        BadEncoding: if names, shapes, dtypes or values are none that encoding returns.
    """
    outlines = layouts(stages, like)
    _check_layout(encoded, outlines[-1])
    decoded = dict(encoded)
    for place in reversed(range(len(stages))):
        decoded = stages[place].decode(decoded, outlines[place], derived(seed, str(place)))
    return decoded


def derived(seed: int, name: str) -> int:
    """Return a 63-bit seed that depends on both."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def share(density: float, like: Tensor) -> int:
    """Return how many numbers a share of a tensor is, at least 1 and at most all of them."""
    return min(like.numel(), max(1, round(density * like.numel())))


def _check_layout(encoded: Tensors, wanted: Tensors) -> None:
    odd = sorted(wanted.keys() ^ encoded.keys())
    if odd:
        raise BadEncoding(f"{odd[0]} is {'missing' if odd[0] in wanted else 'not asked for'}")
    for name, tensor in sorted(encoded.items()):
        like = wanted[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            got, want = f"{tensor.dtype} {list(tensor.shape)}", f"{like.dtype} {list(like.shape)}"
            raise BadEncoding(f"{name} is {got}, expected {want}")
