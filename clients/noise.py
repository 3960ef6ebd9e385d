"""The only source of DP noise and Poisson samples: a cryptographic stream bound to what it hides.

Every draw is ChaCha20 keystream under a key of its own, derived with HKDF-SHA256 (RFC 5869) from
the client's secret key, the digest of the whole assignment and what the draw is for. Two different
broadcasts can therefore never get the same noise, which a curious server could cancel by
subtraction, while a retry of one assignment gets the same noise again, byte for byte.

Floating-point numbers lie unevenly: from which of them a sum with noise can and cannot be, one can
tell what the noise was added to (Mironov, 2012; 2112.05307). So what is released lies on a grid,
and :func:`discretised` computes it exactly, from whole numbers alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from clients.keys import KEY_BYTES

_UNIT = 2.0**-53  # distance of neighbouring uniforms: all that a float64 below 1 resolves
_FINENESS = 2.0**-24  # of a grid, over all of its dimensions and relative to the bound

MARGIN = 1 + 2.0**-10
"""What noise is multiplied by, for sums that one example moves by a little more than the bound.

It pays for rounding: to the grid, by 2^-24 of the bound, and of the float32 sums of a microbatch,
by less than n² 2^-24 of it for n examples (2207.10635, section 5).
"""


class BadKey(ValueError):
    """A key is not 32 bytes long."""


def insecure_key(seed: int, client: str) -> bytes:
    """Return a key that anybody can compute: for tests and reproducible experiments only.

    Args:
        seed: the run's ``privacy.insecure_seed``.
        client: the client's name; different clients get independent keys.
    """
    return hashlib.sha256(json.dumps(["weft insecure key", seed, client]).encode()).digest()


@dataclass(frozen=True, slots=True)
class NoiseStream:
    """Gaussian noise and Poisson samples for one assignment of one client.

    Draws are independent for different keys, digests, names, steps and shapes, and equal for equal
    ones. About 40 ms for a million normals on one core.

    Args:
        key: the client's secret, 32 bytes.
        digest: the assignment's digest.

    Raises:
        BadKey: if the key has another length.
    """

    key: bytes = field(repr=False)
    digest: str

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise BadKey(
                f"a noise key must be {KEY_BYTES} bytes, got {len(self.key)}; make one with new_key"
            )

    def normal(self, name: str, step: int, shape: Sequence[int]) -> Tensor:
        """Return standard normals of ``shape``, float64, on the CPU.

        Box-Muller on uniforms of 64 bits for the radius: no value beyond 9.5 standard deviations,
        which a true normal reaches with probability 1e-21. Release them by :func:`discretised`.

        Args:
            name: the tensor that the noise hides.
            step: the optimizer step, >= 0.
            shape: of the result.
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        words = self._words(["normal", name, step, list(shape)], 2 * half)
        uniforms = (words[:half].astype(np.float64) + 0.5) * 2.0**-64  # (0, 1], never log 0
        # Torch's cosine is six times faster than NumPy's, and the logarithm half as fast.
        radius = torch.from_numpy(np.sqrt(-2.0 * np.log(uniforms)))
        angle = torch.from_numpy(_unit_interval(words[half:]) * (2.0 * np.pi))
        normals = torch.cat([radius * angle.cos(), radius * angle.sin()])
        return normals[:count].reshape(tuple(shape))

    def poisson_sample(self, step: int, num_examples: int, rate: float) -> Tensor:
        """Return the indices of a step's examples: each is in it with probability ``rate``.

        Args:
            step: the optimizer step, >= 0.
            num_examples: size of the data set, >= 0.
            rate: in (0, 1]; 1 takes every example.

        Returns:
            Indices, int64 ``[drawn]``, ascending; often not ``rate * num_examples`` many, and
            possibly none.

        Raises:
            ValueError: if the rate is out of range.
        """
        if not 0 < rate <= 1:
            raise ValueError(f"the sample rate must be > 0 and <= 1, got {rate}")
        words = self._words(["poisson", step, num_examples, rate], num_examples)
        return torch.from_numpy(np.flatnonzero(_unit_interval(words) < rate).astype(np.int64))

    def pick(self, step: int, sizes: Sequence[int], most: int = 1) -> list[list[int]]:
        """Return for each of ``sizes`` some different numbers below it, every set as likely.

        Args:
            step: the optimizer step, >= 0.
            sizes: each >= 1.
            most: how many numbers, >= 1; all of them where there are no more.
        """
        words = self._words(["pick", step, len(sizes), most], len(sizes) * most)
        uniforms = _unit_interval(words).reshape(len(sizes), most).tolist()
        return [_different(row, size) for row, size in zip(uniforms, sizes, strict=True)]

    def _words(self, purpose: list[object], count: int) -> npt.NDArray[np.uint64]:
        """Return ``count`` random words of 64 bits for one purpose."""
        info = json.dumps([self.digest, *purpose]).encode()
        key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self.key)
        # A fixed nonce is right here: the derived key is used for this one message only.
        cipher = Cipher(algorithms.ChaCha20(key, nonce=bytes(16)), mode=None)
        return np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")


def grid_of(bound: float, size: int, fineness: float = _FINENESS) -> float:
    """Return the distance of neighbouring points of the grid that a noised sum is released on.

    Rounding ``size`` numbers to it moves a sum by at most half of ``fineness`` times ``bound``, and
    the difference of two sums by twice that, whatever they are.

    Args:
        bound: on the norm of what one example adds, > 0.
        size: how many numbers are released, >= 1.
        fineness: 2^-24, or what :data:`MARGIN` pays for too.

    Returns:
        A power of two.
    """
    return 2.0 ** math.floor(math.log2(bound * fineness / math.sqrt(size)))


def discretised(total: Tensor, noise: Tensor, grid: float) -> Tensor:
    """Return the sum of ``total`` and ``noise``, each rounded to the grid: exact in every bit.

    A rounded normal added to a point of the grid is the sum rounded, so that this is Gaussian noise
    on rounded totals, and costs what it costs. Any point can come of any total: none of them gives
    away what the noise was added to. What remains is that the noise itself has 53 bits and not
    infinitely many, of which the grid's points see those before the last twenty or so.

    Args:
        total: what is to be hidden, float64; multiples of the grid below 2^52.
        noise: of the same shape, float64, with its standard deviation.
        grid: a power of two.
    """
    return ((total / grid).round() + (noise / grid).round()) * grid


def _different(uniforms: Sequence[float], size: int) -> list[int]:
    """Return different numbers below ``size``: the first places of a Fisher-Yates shuffle."""
    shuffled: dict[int, int] = {}
    found = []
    for place, uniform in enumerate(uniforms[:size]):
        other = place + int(uniform * (size - place))
        found.append(shuffled.get(other, other))
        shuffled[other] = shuffled.get(place, place)
    return found


def _unit_interval(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1), multiples of 2^-53."""
    return (words >> np.uint64(11)).astype(np.float64) * _UNIT
