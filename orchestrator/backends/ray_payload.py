"""Assignments and updates as Ray carries them: plain fields, and tensors through its object store.

A round's broadcast, underlay and memory are put into the store once; what comes back is copied out
of it when its turn has come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias, cast

import numpy as np
import ray
import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.by_identity import ByIdentity
from clients.evaluate import Evaluation
from orchestrator.backends.base import Failure, Result
from strategies.base import Broadcast, Tensors, Update

Arrays: TypeAlias = Mapping[str, tuple[str, tuple[int, ...], Any]]
Work: TypeAlias = tuple[dict[str, Any], tuple[str, str], dict[str, str]]
"""Plain fields, what is trainable and what personal, and the keys of the parts that are tensors."""

_FIELDS = [f.name for f in fields(Assignment) if f.name not in ("broadcast", "underlay", "memory")]


class Once(ByIdentity[Any]):
    """Puts a mapping of tensors into the object store once, and returns its reference there."""

    def __init__(self) -> None:
        super().__init__(lambda tensors: ray.put(to_arrays(tensors)))


def split(assignment: Assignment, put: Once) -> tuple[Any, ...]:
    """Return the arguments of a worker's call: the assignment but for its tensors, and those.

    The fields go as they are: making, pickling and replacing an Assignment without tensors shows
    in the time of an empty call.
    """
    sent = assignment.broadcast
    parts = {
        "tensors": sent.tensors,
        "mask": sent.mask,
        "extra": sent.extra,
        "underlay": assignment.underlay,
        "memory": assignment.memory,
    }
    refs = {name: put(part, assignment.round) for name, part in parts.items() if part}
    values = {name: getattr(assignment, name) for name in _FIELDS}
    patterns = sent.trainable, sent.personal
    return (values, patterns, {name: ref.hex() for name, ref in refs.items()}), *refs.values()


def joined(work: Work, parts: Mapping[str, Tensors]) -> Assignment:
    """Return the assignment as it was, with the parts that it names by their keys."""
    values, (trainable, personal), keys = work
    tensors, mask, extra, underlay, memory = (
        parts[keys[name]] if name in keys else {}
        for name in ("tensors", "mask", "extra", "underlay", "memory")
    )
    sent = Broadcast(tensors, trainable, personal, mask, extra)
    return Assignment(broadcast=sent, underlay=underlay, memory=memory, **values)


def result_of(answer: Any) -> Result:
    """Return what a worker answered, an update with tensors that own their memory."""
    if not isinstance(answer, tuple):
        return cast(Evaluation | Failure, answer)
    bare, tensors, memory = answer
    return replace(cast(Update, bare), tensors=to_tensors(tensors), memory=to_tensors(memory))


def to_arrays(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """Return tensors as raw byte arrays, which Ray writes and maps without a copy; any dtype."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in tensors.items()
    }


def to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return tensors in memory of their own, and of theirs together: the store is read-only.

    One allocation is kept and used again by the C library; one a tensor would be handed back to the
    system and cost a page fault every 4 KiB, ten times the copy itself.
    """
    found: dict[str, Tensor] = {}
    memory = np.empty(sum(_aligned(array.size) for _, _, array in arrays.values()), np.uint8)
    start = 0
    for name, (dtype, shape, array) in arrays.items():
        own = memory[start : start + array.size]
        own[:] = array
        found[name] = torch.from_numpy(own).view(getattr(torch, dtype)).reshape(shape)
        start += _aligned(array.size)
    return found


def _aligned(size: int) -> int:
    """Return ``size`` rounded up to 64 bytes: any dtype may begin there."""
    return -(-size // 64) * 64
