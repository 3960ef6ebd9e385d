"""Columns and rows of base weights, by index: what an adapter need not store (CURLoRA)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from clients import placement
from clients.assignment import ModelSpec
from clients.lora_layers import CORE, A, B
from strategies.base import Tensors

COLUMNS, ROWS = ".columns", ".rows"
"""What an adapter's tensors are called that are indices of them, int64 ``[rank]``."""


def base_weight(layer: Any) -> Tensor:
    """Return a linear layer's weight, ``[out, in]``, not a copy; Conv1D keeps it transposed."""
    weight: Tensor = layer.weight.detach()
    return weight.T if placement.transposed({"": layer}) else weight


def between(name: str, layer: Any, columns: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Return a base layer's rows as ``lora_A`` and its columns as ``lora_B``, float32.

    Args:
        name: of the layer, for the names of the result.
        layer: the base model's, not quantised.
        columns: indices of columns.
        rows: indices of rows.
    """
    weight = base_weight(layer)
    columns, rows = (index.to(weight.device) for index in (columns, rows))
    return {name + A: weight[rows].float(), name + B: weight[:, columns].float()}


def spelled_out(tensors: Tensors, spec: ModelSpec) -> dict[str, Tensor]:
    """Return an adapter with plain factors for its indices; as it is if it has none.

    ``C core R`` is the product of ``lora_B = C core`` and ``lora_A = R``, at the core's rank.

    Args:
        tensors: an adapter's, by weft's names.
        spec: its base model.

    Raises:
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not here,
            and there are indices.
    """
    layers = [name.removesuffix(COLUMNS) for name in tensors if name.endswith(COLUMNS)]
    found = dict(tensors)
    if not layers:
        return found
    from clients import models  # transformers takes seconds: listing plug-ins does not need it

    backbone = models.load(replace(spec, gradient_checkpointing=False)).backbone
    for name in layers:
        columns, rows, core = (found.pop(name + part) for part in (COLUMNS, ROWS, CORE))
        factors = between(name, backbone.get_submodule(name), columns, rows)
        found |= {name + A: factors[name + A].cpu(), name + B: factors[name + B].cpu() @ core}
    return found
