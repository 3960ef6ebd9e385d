"""Adapters small enough to check against dense arithmetic."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from strategies.base import ServerState, Update, beneath

Adapter = dict[str, Tensor]
LAYERS = {"encoder.query": (7, 12), "encoder.value": (9, 12)}  # name: (out, in)


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """An adapter by seed: random A and B, and a head unless told otherwise."""

    def make(
        seed: int = 0,
        *,
        rank: int = 4,
        scaling: float = 2.0,
        dtype: torch.dtype = torch.float32,
        head: bool = True,
        layers: Mapping[str, tuple[int, int]] = LAYERS,
        core: bool = False,
        magnitudes: bool = False,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        tensors = {}
        for name, (out_features, in_features) in layers.items():
            tensors[f"{name}.lora_A.weight"] = draw(rank, in_features)
            tensors[f"{name}.lora_B.weight"] = draw(out_features, rank)
            tensors[f"{name}.scaling"] = torch.tensor(scaling)
            if core:
                tensors[f"{name}.lora_core.weight"] = draw(rank, rank)
            if magnitudes:
                tensors[f"{name}.lora_magnitudes"] = draw(1)
        if head:
            tensors |= {"head.weight": draw(3, 5), "head.bias": draw(3)}
        return tensors

    return make


@pytest.fixture
def products() -> Callable[[Mapping[str, Tensor]], Adapter]:
    """Every layer's scaling * B @ A, or B @ core @ A, dense and in float64."""

    def dense(tensors: Mapping[str, Tensor]) -> Adapter:
        found = {}
        for layer in sorted(n.removesuffix(".scaling") for n in tensors if n.endswith(".scaling")):
            b = tensors[f"{layer}.lora_B.weight"].double()
            if f"{layer}.lora_core.weight" in tensors:
                b = b @ tensors[f"{layer}.lora_core.weight"].double()
            if f"{layer}.lora_magnitudes" in tensors:
                b = b * tensors[f"{layer}.lora_magnitudes"].double()
            a = tensors[f"{layer}.lora_A.weight"].double()
            found[layer] = tensors[f"{layer}.scaling"].double() * b @ a
        return found

    return dense


@pytest.fixture
def whole(products) -> Callable[[ServerState], Adapter]:
    """Every layer's product with what lies beneath it, dense and in float64."""

    def dense(state: ServerState) -> Adapter:
        lying = products(beneath(state.auxiliary))
        return {n: p + lying[n] if n in lying else p for n, p in products(state.adapter).items()}

    return dense


@pytest.fixture
def make_update() -> Callable[..., Update]:
    """An update with the bookkeeping filled in."""

    def make(tensors: Mapping[str, Tensor], client: str = "a", num_examples: int = 1) -> Update:
        return Update(client, 1, "733e", tensors, num_examples)

    return make
