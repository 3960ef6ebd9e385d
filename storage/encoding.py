"""Tensors as the bytes of a safetensors file, with a single copy.

The bytes are those of :func:`safetensors.torch.save`, whose three copies cost more than hashing and
writing them; and they stay the same whatever a later version of it does, as ids must.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from safetensors.torch import load
from torch import Tensor


class BadTensor(ValueError):
    """A tensor that no blob may hold."""


DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's name of each dtype, in the order in which tensors lie in a file."""

_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # numpy has no bfloat16


def decoded(data: bytes) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a blob, in order of their names."""
    return dict(sorted(load(data).items()))


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """Return ``tensors`` as a safetensors file without metadata; deterministic in its argument.

    Args:
        tensors: contiguous, on the CPU, of :data:`DTYPES`.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = (_bytes(tensors[name]) for name in names)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's own memory; a copy on big-endian machines."""
    values = tensor.view(_INTEGERS[tensor.element_size()]).reshape(-1).numpy()
    return values.astype(values.dtype.newbyteorder("<"), copy=False).data


def canonical_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return what a blob of ``tensors`` holds: the same for equal tensors.

    Raises:
        BadTensor: as :meth:`BlobStore.put`.
    """
    plain: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if name == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in name):
            raise BadTensor(
                f"a tensor cannot be called {name[:60]!r}: safetensors keeps that name for itself, "
                "or it is no UTF-8; rename it"
            )
        tensor = tensors[name].detach()
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
            raise BadTensor(
                f"tensor {name!r} is {tensor.layout} {tensor.dtype}; "
                f"the store takes strided tensors of {allowed}"
            )
        plain[name] = tensor.cpu().contiguous()
        if tensor.is_floating_point() and not _is_finite(plain[name]):
            count = int((~torch.isfinite(tensor)).sum())
            raise BadTensor(
                f"tensor {name!r} has {count} of {tensor.numel()} values that are not finite; "
                "a version holds only finite values"
            )
    return encoded(plain)


def _is_finite(tensor: Tensor) -> bool:
    # A sum is not finite if any value is not; a mask of all would be written and read. That of
    # finite values may be too large, so it only acquits.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
