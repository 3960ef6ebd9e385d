"""The only source of DP noise and Poisson samples: a cryptographic stream bound to what it hides.

Every draw is ChaCha20 keystream under a key of its own, derived with HKDF-SHA256 (RFC 5869) from
the client's secret key, the digest of the whole assignment and what the draw is for. Two different
broadcasts can therefore never get the same noise, which a curious server could cancel by
subtraction, while a retry of one assignment gets the same noise again, byte for byte.
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

        Box-Muller on 53-bit uniforms: no value beyond 8.6 standard deviations, which a true
        normal reaches with probability 1e-17. Add them in float64 and round afterwards, so that
        the low bits, in which float noise is not uniform (Mironov 2012), are rounded away.

        Args:
            name: the tensor that the noise hides.
            step: the optimizer step, >= 0.
            shape: of the result.
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        uniforms = self._uniforms(["normal", name, step, list(shape)], 2 * half)
        radius = np.sqrt(-2.0 * np.log(uniforms[:half] + _UNIT))  # + unit: (0, 1], never log 0
        angle = (2.0 * np.pi) * uniforms[half:]
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(normals[:count]).reshape(tuple(shape))

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
        uniforms = self._uniforms(["poisson", step, num_examples, rate], num_examples)
        return torch.from_numpy(np.flatnonzero(uniforms < rate).astype(np.int64))

    def pick(self, step: int, sizes: Sequence[int]) -> list[int]:
        """Return one of the numbers below each of ``sizes``, drawn evenly.

        Args:
            step: the optimizer step, >= 0.
            sizes: each >= 1.
        """
        uniforms = self._uniforms(["pick", step, len(sizes)], len(sizes))
        return [int(u * size) for u, size in zip(uniforms.tolist(), sizes, strict=True)]

    def _uniforms(self, purpose: list[object], count: int) -> npt.NDArray[np.float64]:
        """Return ``count`` uniforms in [0, 1), multiples of 2^-53, for one purpose."""
        info = json.dumps([self.digest, *purpose]).encode()
        key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self.key)
        # A fixed nonce is right here: the derived key is used for this one message only.
        cipher = Cipher(algorithms.ChaCha20(key, nonce=bytes(16)), mode=None)
        words = np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * _UNIT
