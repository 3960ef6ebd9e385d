"""Top-k: the largest changes, and where they are.

Source: arXiv 1704.05021; with memory of what was left out, arXiv 1809.07599 (algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.plugins import Range
from strategies.uplink import BadEncoding, share

_AT = ":at"


@dataclass(frozen=True, slots=True)
class TopK:
    """Of each tensor only the entries travel that changed most.

    Their places are ``NAME:at``, int32, ascending. Of equals, the first is sent.

    Attributes:
        density: share of each tensor's entries that is sent, at least one; 1 is all of them.
        feedback: whether the client keeps what is left out for its next round. Without it most of a
            change never arrives.
    """

    density: Annotated[float, Range(0, 1, open_low=True)] = 0.05
    feedback: bool = True

    last: ClassVar[bool] = False

    def layout(self, like: Tensors) -> dict[str, Tensor]:
        """Return one dimension of values, and of places, for each tensor."""
        found: dict[str, Tensor] = {}
        for name, tensor in like.items():
            found[name] = tensor
            if tensor.is_floating_point():
                count = share(self.density, tensor)
                found[name] = tensor.new_empty(count)
                found[name + _AT] = tensor.new_empty(count, dtype=torch.int32)
        return found

    def encode(self, tensors: Tensors, seed: int) -> dict[str, Tensor]:
        """Return the largest entries and their places; nothing is drawn."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found[name] = tensor
            if tensor.is_floating_point():
                flat = tensor.flatten()
                order = flat.abs().sort(descending=True, stable=True).indices
                places = order[: share(self.density, tensor)].sort().values
                found |= {name: flat[places], name + _AT: places.to(torch.int32)}
        return found

    def decode(self, encoded: Tensors, like: Tensors, seed: int) -> dict[str, Tensor]:
        """Return the entries that were sent, and 0 for the others.

        Raises:
            BadEncoding: if the places are not ascending, or one is outside its tensor.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in like.items():
            found[name] = encoded[name]
            if tensor.is_floating_point():
                places, size = encoded[name + _AT].long(), tensor.numel()
                inside = bool(((places >= 0) & (places < size)).all())
                if not (inside and bool((places.diff() > 0).all())):
                    raise BadEncoding(
                        f"{name + _AT} must hold ascending places from 0 to {size - 1}"
                    )
                flat = torch.zeros(size, dtype=tensor.dtype)
                flat[places] = encoded[name]
                found[name] = flat.reshape(tensor.shape)
        return found
