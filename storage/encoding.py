"""Tensors as the bytes of a safetensors file, with a single copy.

The bytes are those of :func:`safetensors.torch.save`, whose three copies cost more than hashing and
writing them; and they stay the same whatever a later version of it does, as ids must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

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
