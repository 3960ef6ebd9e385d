"""Half precision: two bytes a number.

Source: IEEE 754 binary16; in training, arXiv 1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import Tensors

_MOST = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Fp16:
    """Numbers travel in half precision: half the bytes, and three digits of each change.

    What is beyond ±65504 is sent as that.
    """

    last: ClassVar[bool] = True
    feedback: ClassVar[bool] = False

    def layout(self, like: Tensors) -> dict[str, Tensor]:
        """Return the same shapes in float16."""
        return {n: t.half() if t.is_floating_point() else t for n, t in like.items()}

    def encode(self, tensors: Tensors, seed: int) -> dict[str, Tensor]:
        """Return ``tensors`` rounded to float16; nothing is drawn."""
        return {
            n: t.clamp(-_MOST, _MOST).half() if t.is_floating_point() else t
            for n, t in tensors.items()
        }

    def decode(self, encoded: Tensors, like: Tensors, seed: int) -> dict[str, Tensor]:
        """Return the numbers in the dtypes of ``like``."""
        return {n: encoded[n].to(t.dtype) for n, t in like.items()}
