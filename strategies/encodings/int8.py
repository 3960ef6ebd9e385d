"""Eight bits a number, in steps of one scale.

Source: arXiv 1511.04561, with linear steps: 127 times the scale is the largest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.uplink import BadEncoding

_STEPS = 127
_SCALE = ":scale"


@dataclass(frozen=True, slots=True)
class Int8:
    """Numbers travel as steps of one scale, eight bits each: a quarter of the bytes.

    Rounded to the nearest step, without a random part. The scale is ``NAME:scale``.

    Attributes:
        scale: one for each ``row`` of a matrix, or one for each ``tensor``. What is no matrix has
            one.
        feedback: whether the client keeps what rounding left out for its next round.
    """

    scale: Literal["row", "tensor"] = "row"
    feedback: bool = False

    last: ClassVar[bool] = True

    def layout(self, like: Tensors) -> dict[str, Tensor]:
        """Return the same shapes in int8, and the scales in float32."""
        found: dict[str, Tensor] = {}
        for name, tensor in like.items():
            found[name] = tensor
            if tensor.is_floating_point():
                found[name] = tensor.to(torch.int8)
                found[name + _SCALE] = tensor.new_empty(self._scales(tensor), dtype=torch.float32)
        return found

    def encode(self, tensors: Tensors, seed: int) -> dict[str, Tensor]:
        """Return ``tensors`` in steps, and their scales; nothing is drawn."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found[name] = tensor
            if tensor.is_floating_point():
                rows = tensor.double().abs().reshape(*self._scales(tensor), -1)
                largest = rows.amax(dim=-1) if tensor.numel() else rows.new_zeros(rows.shape[:-1])
                scale = (largest / _STEPS).float()
                steps = tensor.double() / self._along(scale.double(), tensor)
                # a row of zeros has scale 0; one that float32 cannot hold, none that counts
                steps = torch.nan_to_num(steps, nan=0.0).round().clamp(-_STEPS, _STEPS)
                found |= {name: steps.to(torch.int8), name + _SCALE: scale}
        return found

    def decode(self, encoded: Tensors, like: Tensors, seed: int) -> dict[str, Tensor]:
        """Return steps times scale.

        Raises:
            BadEncoding: if a scale is negative or not finite.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in like.items():
            found[name] = encoded[name]
            if tensor.is_floating_point():
                scale = encoded[name + _SCALE].double()
                if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
                    raise BadEncoding(f"{name + _SCALE} must hold finite scales of at least 0")
                steps = encoded[name].double() * self._along(scale, tensor)
                found[name] = steps.to(tensor.dtype)
        return found

    def _scales(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of a tensor's scales."""
        return (tensor.shape[0],) if self.scale == "row" and tensor.dim() == 2 else ()

    def _along(self, scale: Tensor, tensor: Tensor) -> Tensor:
        return scale[:, None] if self._scales(tensor) else scale
