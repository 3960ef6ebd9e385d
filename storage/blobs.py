"""Tensors as files named by the hash of their content.

A blob is a safetensors file without metadata. Equal tensors are equal bytes whatever the order of
the names, the strides or the device, so that a digest names values and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from storage.encoding import DTYPES, encoded

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobMissing(LookupError):
    """No blob has this digest."""


class BlobCorrupt(RuntimeError):
    """A blob's bytes are not those that its name says."""


class BadTensor(ValueError):
    """A tensor that no blob may hold."""


class BlobStore:
    """A folder of blobs, ``root/ab/cdef...``; safe with any number of writers.

    Args:
        root: the folder; made by the first :meth:`put`.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root)

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Store ``tensors`` and return their digest; they are on the disk when it returns.

        Costs one copy of the tensors in memory. What is stored already is not written again.

        Raises:
            BadTensor: if a value is not finite, or a dtype is none of float, integer and boolean.
        """
        data = _canonical_bytes(tensors)
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        # A file of another size is the remains of a bad disk or copy: storing it again heals it.
        if not path.exists() or path.stat().st_size != len(data):
            _write_atomically(path, data)
        return digest

    def get(self, digest: str) -> dict[str, Tensor]:
        """Return the tensors called ``digest``, in order of their names.

        Raises:
            BlobMissing: if there are none.
            BlobCorrupt: if the file was changed or cut short.
        """
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobMissing(
                f"no blob {digest[:12]} in {self._root}; restore it from a backup, or "
                "point weft at the folder that belongs to this database"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise BlobCorrupt(
                f"blob {digest[:12]} is corrupt: {path} has {len(data)} bytes that hash to "
                f"{found[:12]}; restore the file from a backup"
            )
        return dict(sorted(load(data).items()))

    def digest(self, tensors: Mapping[str, Tensor]) -> str:
        """Return the digest that :meth:`put` would, without writing.

        Raises:
            BadTensor: as :meth:`put`.
        """
        return hashlib.sha256(_canonical_bytes(tensors)).hexdigest()

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise BlobMissing(f"a blob's digest is 64 hex digits, got {digest!r}")
        return self._root / digest[:2] / digest[2:]


def _canonical_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    plain: dict[str, Tensor] = {}
    for name in sorted(tensors):
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
    # The extremes are infinite or NaN if any value is; a mask of all would be written and read.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``; after a crash it holds all of it or is as it was."""
    new_folder = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
        if new_folder:
            _sync_folder(path.parent.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
