"""The digest of an assignment's fields, to which DP noise is bound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_DIGESTS: MutableMapping[torch.Tensor, tuple[int, str]] = WeakTensorKeyDictionary()
"""What tensors that live hashed to, and how often they had been written to when they did."""


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the sha256 of ``document`` as JSON, tensors as digests of dtype, shape and bytes."""
    text = json.dumps(_plain(document), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON, tensors as digests."""
    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor; of one that is as it was, without reading it again.

    A round's clients share its broadcast: here, and at a worker, which keeps it. What torch writes
    to a tensor it counts, so that a changed one is read anew; a write past that count, through
    ``data`` or a NumPy view, is what the types of an assignment forbid.
    """
    known = _DIGESTS.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _DIGESTS[tensor] = tensor._version, _hashed(tensor)
    return known[1]


def _hashed(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().cpu()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    total = hashlib.sha256(head)
    total.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
