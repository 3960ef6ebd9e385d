"""CURLoRA: a small core is trained between columns and rows of the base weight itself.

Source: CURLoRA, arXiv 2408.14572 (eq. 1 to 6). A layer changes by ``alpha * C core R``, C being
``r`` columns of the base weight and R ``r`` of its rows, chosen where the weight is small. What a
task can change is so confined to directions that the base model hardly uses; the same core is
trained task after task (``start: continue``).

C and R follow from the base weight and the indices of its columns and rows. So an adapter *is* its
cores and 2 r integers a layer, which is all that is stored and sent; C and R are looked up whenever
it is attached. That makes it nothing without its base model: merges, stacks and libraries, which
see tensors alone, refuse it. An export has its base model, and is the plain LoRA that it stands
for: ``lora_A = R`` and ``lora_B = C core``.

Where this differs from the authors' code (MNoorFawi/curlora):

* Indices are drawn with the paper's probabilities, ``q_j`` proportional to ``1 / p_j`` with ``p_j``
  the share of column j in the weight's squared norm. The code adds 0.001 to each ``p_j``, which at
  4096 columns, where they are 0.00024 on average, makes the draw nearly uniform; ``eps: 0.001`` is
  that. A column of zeros, of which the paper's formula makes a division by zero, is never drawn.
* No column is drawn twice, because the second one adds nothing; ``replacement: true`` is theirs.
* C and R belong to the adapter by their indices; there they are lost when it is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from clients import lora_layers
from clients.adapters.lora_sb import Core, put_core
from clients.adapters.peft import TRAINED, Method, PeftLora, plugin
from clients.base_columns import COLUMNS, ROWS, base_weight, between
from clients.initialisations import InitInputs
from clients.lora_layers import CORE, A, AdapterMismatch, B
from strategies.base import Tensors
from strategies.plugins import BadOptions, Plugin, Range

CURLORA = Method(
    "curlora",
    "A small core trained between columns and rows of the base weight, which are never stored.",
    "2408.14572",
    {},
    frozenset({"merge", "dp-taps", "unquantised-base", "zero-b"}),
)


@dataclass(frozen=True, slots=True)
class CurLoRA(PeftLora):
    """A core ``NAME.lora_core.weight`` ``[r, r]`` and the indices ``NAME.columns``, ``NAME.rows``.

    Indices are int64 ``[r]``, ascending. Clients share C and R, so that the mean of their products
    is the product of their mean: averaging cores is exact.

    Attributes:
        alpha: the scaling, > 0; it is not divided by the rank.
        eps: added to every column's and row's share of the squared norm before it is inverted,
            >= 0: the larger, the more uniform the draw.
        replacement: whether a column or row may be drawn more than once.
    """

    alpha: Annotated[float, Range(0, open_low=True)] = 1.0
    eps: Annotated[float, Range(0)] = 0.0
    replacement: bool = False

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train: indices, and what is looked up by them."""
        return r".*\.(lora_[AB]\.weight|columns|rows)"

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place), on indices drawn uniformly.

        Raises:
            BadOptions: if a target does not exist, a rank exceeds its layer, or a layer is
                quantised.
            UnsupportedUnderlay: if there is an underlay.
        """
        model = PeftLora.attach(self, backbone, underlay)
        for layer in lora_layers.adapted(model, TRAINED).values():
            layer.scaling[TRAINED] = float(layer.lora_alpha[TRAINED])
            put_core(layer, _Cur())
            out, width = layer.out_features, layer.in_features
            rank = layer.r[TRAINED]
            columns, rows = (torch.randperm(n, device="cpu")[:rank] for n in (width, out))
            _look_up(layer, columns.sort().values, rows.sort().values)
        return model

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Draw the indices by the base weight's columns and rows; see :func:`probabilities`.

        Raises:
            BadOptions: if a layer has fewer columns or rows that may be drawn than its rank.
        """
        for name, layer in lora_layers.adapted(model, TRAINED).items():
            columns, rows = (self._drawn(name, layer, dim) for dim in (1, 0))
            _look_up(layer, columns, rows)
        return {}

    def _drawn(self, name: str, layer: Any, dim: int) -> Tensor:
        """Return indices of columns (``dim`` 1) or rows (0) of a layer, ``[rank]``, ascending."""
        rank = layer.r[TRAINED]
        chances = probabilities(base_weight(layer.get_base_layer()), dim, self.eps)
        possible = int((chances > 0).sum())
        if possible < (1 if self.replacement else rank):
            raise BadOptions(
                f"curlora draws {rank} {('rows', 'columns')[dim]} of {name}, which has {possible} "
                "that are not zero; lower the rank, or leave the layer out of target_modules"
            )
        return torch.multinomial(chances, rank, self.replacement).sort().values

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the live cores."""
        found = lora_layers.parameters(model, TRAINED)
        return {name: parameter for name, parameter in found.items() if name.endswith(CORE)}

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of cores, indices and scalings."""
        tensors = PeftLora.read(self, model)
        for name, layer in lora_layers.adapted(model, TRAINED).items():
            chosen: _Cur = layer.lora_variant[TRAINED]
            tensors[name + COLUMNS] = chosen.columns.clone()
            tensors[name + ROWS] = chosen.rows.clone()
        return tensors

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` into the adapter, and look C and R up in the base weights.

        Raises:
            AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer; nothing
                is written then.
        """
        layers = lora_layers.adapted(model, TRAINED)
        indices = {name: _indices(name, layer, tensors) for name, layer in layers.items()}
        whole = {n: t for n, t in tensors.items() if not n.endswith((COLUMNS, ROWS))}
        for name, layer in layers.items():
            whole |= between(name, layer.get_base_layer(), *indices[name])
        lora_layers.write(model, TRAINED, whole)
        for name, layer in layers.items():
            chosen: _Cur = layer.lora_variant[TRAINED]
            chosen.columns, chosen.rows = indices[name]


class _Cur(Core):
    """A core between columns and rows, which it knows by their indices."""

    columns: Tensor
    rows: Tensor


def probabilities(weight: Tensor, dim: int, eps: float = 0.0) -> Tensor:
    """Return with which probability each column or row of a weight is drawn first, on the CPU.

    >>> probabilities(torch.tensor([[1.0, 2.0, 0.0]]), 1)
    tensor([0.8000, 0.2000, 0.0000], dtype=torch.float64)

    Args:
        weight: ``[out, in]``.
        dim: 1 for columns, 0 for rows.
        eps: added to each one's share of the squared norm; with 0, those of norm 0 are never
            drawn.

    Returns:
        ``[in]`` or ``[out]``, float64, which sum to 1; all zero where the weight is.
    """
    norms = torch.linalg.vector_norm(weight, dim=1 - dim, dtype=torch.float64)
    squares = norms.cpu().square()
    shares = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    inverted = torch.where(shares > 0, 1 / shares, 0.0)
    return inverted / inverted.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _look_up(layer: Any, columns: Tensor, rows: Tensor) -> None:
    """Put the columns and rows with these indices between which the core stands."""
    found = between("", layer.get_base_layer(), columns, rows)
    with torch.no_grad():
        layer.lora_A[TRAINED].weight.copy_(found[A])
        layer.lora_B[TRAINED].weight.copy_(found[B])
    chosen: _Cur = layer.lora_variant[TRAINED]
    chosen.columns, chosen.rows = columns, rows


def _indices(name: str, layer: Any, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return copies of a layer's indices of columns and rows among ``tensors``.

    Raises:
        AdapterMismatch: if there are none, or they are none of this layer.
    """
    found = []
    for part, size in zip((COLUMNS, ROWS), (layer.in_features, layer.out_features), strict=True):
        index = tensors.get(name + part)
        if index is None:
            raise AdapterMismatch(
                f"the adapter has no tensor {name + part}; it was trained by another method, or on "
                "other target_modules"
            )
        if index.dtype != torch.int64 or index.ndim != 1 or not len(index):
            raise AdapterMismatch(
                f"{name + part} must be int64 [rank], got {index.dtype} {list(index.shape)}"
            )
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise AdapterMismatch(
                f"{name + part} must be indices from 0 to {size - 1}, got {int(index.min())} to "
                f"{int(index.max())}; the adapter belongs to another base model"
            )
        found.append(index.detach().to("cpu", copy=True))
    if len(found[0]) != len(found[1]):
        raise AdapterMismatch(
            f"{name} has {len(found[0])} columns and {len(found[1])} rows; they must be as many"
        )
    return found[0], found[1]


def plugins() -> Iterator[Plugin]:
    """Yield CURLoRA."""
    yield plugin(CURLORA, CurLoRA)
