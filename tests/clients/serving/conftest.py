"""Adapters on the tiny models, each also as weft's own training attaches it."""

import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec

KINDS = {
    "rank 2": ("lora", {"r": 2}),
    "rank 5": ("lora", {"r": 5, "alpha": 3.0}),
    "rslora": ("rslora", {"r": 4, "alpha": 7.0, "layers": [1]}),
    "dora": ("dora", {"r": 3}),
    "bdlora": ("bdlora", {"r": 4, "nblocks": 2}),
    "biases": ("lora", {"r": 2, "bias": "lora_only"}),
}
"""What is served side by side: ranks, scalings, layers and methods differ."""


def attached(backbone, kind, seed, targets):
    """Return an adapter's model, with random tensors in every part, and these tensors."""
    name, options = KINDS[kind]
    adapter = ADAPTERS.get(name).build(**{"target_modules": targets, **options})
    torch.manual_seed(seed)
    model = adapter.attach(backbone, {})
    tensors = adapter.read(model)
    for key, tensor in tensors.items():
        if tensor.dim() and "magnitude" not in key:
            tensors[key] = torch.randn(tensor.shape) * 0.3
        elif tensor.dim():
            tensors[key] = tensor * (1 + 0.3 * torch.rand(tensor.shape))
    adapter.write(model, tensors)
    return adapter, model.eval(), tensors


@pytest.fixture
def decoder(tiny_decoder):
    return models.load(ModelSpec(str(tiny_decoder), "causal-lm"))


@pytest.fixture
def encoder(tiny_encoder):
    return models.load(ModelSpec(str(tiny_encoder), "classification", labels=("a", "b")))
