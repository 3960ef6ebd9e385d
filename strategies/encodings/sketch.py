"""Random sketch: sums of entries with random signs, which the seed alone tells apart again.

Source: arXiv 2402.03293 (Flora), where a random projection compresses and its transpose
decompresses. Different here: in place of a Gaussian matrix each entry goes, with a random sign,
into one of the sums, and all sums hold equally many entries, but for one (a count sketch of one
row, as in arXiv 2007.07682). So the projection is orthogonal exactly, drawn in whole numbers
instead of roots and logarithms, and costs one operation an entry; and it goes over a tensor as a
whole instead of one side of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.uplink import derived, share


@dataclass(frozen=True, slots=True)
class Sketch:
    """Random sums of entries travel; the seed of the client's round tells where they belong.

    Attributes:
        density: number of sums over number of entries of each tensor, at least one sum.
        feedback: on, what arrives is the projection of the change onto the sums, and the client
            keeps the rest for its next round. Off, it is the unbiased estimate, as Flora's: the
            right change in the mean, with about ``1/density`` times its variance.
    """

    density: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    feedback: bool = True

    last: ClassVar[bool] = False

    def layout(self, like: Tensors) -> dict[str, Tensor]:
        """Return one dimension of sums for each tensor."""
        return {
            n: t.new_empty(share(self.density, t)) if t.is_floating_point() else t
            for n, t in like.items()
        }

    def encode(self, tensors: Tensors, seed: int) -> dict[str, Tensor]:
        """Return the sums, each over the root of how many entries it has."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found[name] = tensor
            if tensor.is_floating_point():
                sums, owner, signs, counts = self._drawn(tensor, derived(seed, name))
                sums = sums.index_add(0, owner, tensor.flatten().double() * signs)
                found[name] = (sums / counts.sqrt()).to(tensor.dtype)
        return found

    def decode(self, encoded: Tensors, like: Tensors, seed: int) -> dict[str, Tensor]:
        """Return the change that the sums tell of."""
        found: dict[str, Tensor] = {}
        for name, tensor in like.items():
            found[name] = encoded[name]
            if tensor.is_floating_point():
                _, owner, signs, counts = self._drawn(tensor, derived(seed, name))
                size = counts.rsqrt() if self.feedback else counts.sqrt()
                flat = (encoded[name].double() * size)[owner] * signs
                found[name] = flat.reshape(tensor.shape).to(tensor.dtype)
        return found

    def _drawn(self, tensor: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return empty sums, each entry's sum and sign, and how many entries each sum has."""
        generator = torch.Generator().manual_seed(seed)
        size, count = tensor.numel(), share(self.density, tensor)
        owner = torch.randperm(size, generator=generator) % count
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return (
            torch.zeros(count, dtype=torch.float64),
            owner,
            signs,
            torch.bincount(owner, minlength=count).double(),
        )
