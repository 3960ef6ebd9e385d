"""What is made of tensors once, however many assignments of a round share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from strategies.base import Tensors

_REMEMBERED = 20
"""Mappings; a round has five for each kind of clients that it sends something else."""

Made = TypeVar("Made")


class ByIdentity(Generic[Made]):
    """Makes something of a mapping of tensors once, by the mapping's identity.

    It remembers what two rounds sent, and of them what was asked for last: the rest may be
    forgotten. For who trains from an older one and is tried again it is made once more.

    Args:
        make: what is made of a mapping.
    """

    def __init__(self, make: Callable[[Tensors], Made]) -> None:
        self._make = make
        self._known: dict[int, tuple[Tensors, Made, int]] = {}
        self._newest = 0

    def __call__(self, tensors: Tensors, round_: int) -> Made:
        """Return what is made of ``tensors``, for a client of a round."""
        known = self._known.pop(id(tensors), None)
        if known is None:
            # the tensors are kept, so that the id stays theirs
            known = tensors, self._make(tensors), round_
        kept, made, last = known
        self._known[id(tensors)] = kept, made, max(last, round_)
        if round_ > self._newest:
            self._newest = round_
            self._known = {key: one for key, one in self._known.items() if one[2] >= round_ - 1}
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return made
