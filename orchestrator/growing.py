"""Label sets that grow from task to task: a head gets rows for the new labels, and keeps the old.

A run may start from a version whose label set is the beginning of its own. The old rows stay as
they are, bit for bit. A new row is drawn for its label alone, so that labels that come together or
one after the other begin alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.seeds import seed_for
from strategies.base import Tensors

_WEIGHT, _BIAS = "head.weight", "head.bias"


def is_beginning(old: Sequence[str], labels: Sequence[str]) -> bool:
    """Return whether a label set begins with ``old``, in its order; every one does with itself."""
    return tuple(labels[: len(old)]) == tuple(old)


def grown(tensors: Tensors, old: Sequence[str], labels: Sequence[str], seed: int) -> Tensors:
    """Return an adapter whose head has a row for each of ``labels``.

    New rows of ``head.weight`` are drawn from N(0, 0.02²), new biases are zero, as in a new head.

    Args:
        tensors: the adapter; without a head it is returned as it is.
        old: the labels that it has rows for, in order.
        labels: those that it is to have; they begin with ``old``.
        seed: of the run.
    """
    added = labels[len(old) :]
    if not added or _WEIGHT not in tensors:
        return tensors
    weight, bias = tensors[_WEIGHT], tensors[_BIAS]
    rows = [_row(label, weight, seed) for label in added]
    return {
        **tensors,
        _WEIGHT: torch.cat([weight, torch.stack(rows)]),
        _BIAS: torch.cat([bias, bias.new_zeros(len(added))]),
    }


def grown_memory(memory: Tensors, old: Sequence[str], labels: Sequence[str]) -> Tensors:
    """Return a memory in which whatever is kept about the head has rows for the new labels.

    These are its tensors whose names end in ``head.weight`` or ``head.bias``. The new rows are
    zero: what is new was never important, and has nowhere to be drawn back to.
    """
    more = len(labels) - len(old)
    if not more:
        return memory

    def taller(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith((_WEIGHT, _BIAS)) or tensor.shape[:1] != (len(old),):
            return tensor
        return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

    return {name: taller(name, tensor) for name, tensor in memory.items()}


def _row(label: str, like: Tensor, seed: int) -> Tensor:
    from clients.task_model import HEAD_STD  # transformers takes seconds, and few heads grow

    generator = torch.Generator().manual_seed(seed_for(seed, 0, f"head/{label}"))
    row = torch.empty(like.shape[1:])
    torch.nn.init.normal_(row, std=HEAD_STD, generator=generator)
    return row.to(like.dtype)
