"""BD-LoRA: block-diagonal factors, and which layers have which."""

from __future__ import annotations

import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.lora_layers import AdapterMismatch
from strategies.plugins import BadOptions
from strategies.tensors import NotLowRank, lora_layers

QUERY, OUT = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
EVERY = ["q_proj", "o_proj"]


@pytest.fixture
def attach(tiny_decoder):
    """Attach BD-LoRA to the tiny decoder; detached afterwards."""
    backbone = models.load(ModelSpec(str(tiny_decoder), "causal-lm")).backbone
    made = []

    def attach(**options):
        adapter = ADAPTERS.get("bdlora").build(**{"r": 4, "target_modules": EVERY, **options})
        made.append(adapter)
        torch.manual_seed(1)
        model = adapter.attach(backbone, {})
        tensors = {
            n: t if n.endswith(".scaling") else t + torch.randn(t.shape)
            for n, t in adapter.read(model).items()
        }
        adapter.write(model, tensors)
        return adapter, model, tensors

    yield attach
    for adapter in made:
        adapter.detach(backbone)


def change(model, layer: str) -> torch.Tensor:
    """The matrix by which a layer changes what its base layer computes."""
    module = model.get_submodule(layer)
    one = torch.eye(32)
    with torch.no_grad():
        return (module(one) - module.get_base_layer()(one)).T


def test_b_falls_into_blocks_of_outputs_and_a_into_blocks_of_inputs(attach):
    _, _, tensors = attach()
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{QUERY}.lora_B.blocks"].shape == (32, 2)
    assert tensors[f"{OUT}.lora_A.blocks"].shape == (4, 16)
    assert tensors[f"{OUT}.lora_B.weight"].shape == (32, 4)


def test_the_change_is_that_of_factors_whose_off_diagonal_blocks_are_zero(attach):
    _, model, tensors = attach(alpha=6.0)
    blocks = tensors[f"{QUERY}.lora_B.blocks"]
    b = torch.zeros(32, 4)
    b[:16, :2], b[16:, 2:] = blocks[:16], blocks[16:]
    torch.testing.assert_close(change(model, QUERY), 1.5 * b @ tensors[f"{QUERY}.lora_A.weight"])
    blocks = tensors[f"{OUT}.lora_A.blocks"]
    a = torch.zeros(4, 32)
    a[:2, :16], a[2:, 16:] = blocks[:2], blocks[2:]
    torch.testing.assert_close(change(model, OUT), 1.5 * tensors[f"{OUT}.lora_B.weight"] @ a)


def test_a_shard_needs_its_own_blocks_only(attach):
    # The first half of the outputs is the same, whatever the second block of B holds.
    adapter, model, tensors = attach()
    before = change(model, QUERY)
    tensors[f"{QUERY}.lora_B.blocks"][16:] = 9.0
    adapter.write(model, tensors)
    after = change(model, QUERY)
    assert torch.equal(after[:16], before[:16])
    assert not torch.allclose(after[16:], before[16:])


def test_the_layers_with_a_block_diagonal_a_can_be_named(attach):
    _, _, tensors = attach(block_a=["q_proj"])
    assert f"{QUERY}.lora_A.blocks" in tensors
    assert f"{OUT}.lora_B.blocks" in tensors


def test_tensors_of_another_rank_load_as_they_are(attach):
    adapter, model, tensors = attach()
    wide = {
        f"{QUERY}.lora_A.weight": torch.ones(6, 32),
        f"{QUERY}.lora_B.blocks": torch.ones(32, 3),
    }
    adapter.write(model, {**tensors, **wide})
    torch.testing.assert_close(change(model, QUERY), torch.full((32, 32), 3.0))


def test_a_rank_that_does_not_fall_into_blocks_is_refused(attach):
    adapter, model, tensors = attach()
    odd = {
        f"{QUERY}.lora_A.weight": torch.ones(3, 32),
        f"{QUERY}.lora_B.blocks": torch.ones(32, 1),
    }
    with pytest.raises(AdapterMismatch, match="has rank 3, which does not fall into 2 blocks"):
        adapter.write(model, {**tensors, **odd})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nblocks": 1}, "nblocks must be >= 2, got 1"),
        ({"r": 3}, r"nblocks must divide the rank of .*q_proj \(3\), got 2"),
        ({"r": 3, "nblocks": 3}, r"nblocks must divide the outputs of .*q_proj \(32\), got 3"),
        ({"block_a": ["v_proj"]}, "block_a: no adapted layer is called 'v_proj'"),
    ],
)
def test_blocks_that_do_not_divide_are_refused_with_the_layer(attach, options, message):
    with pytest.raises(BadOptions, match=message):
        attach(**options)


def test_the_algebra_of_plain_factors_does_not_take_blocks(attach):
    _, _, tensors = attach()
    with pytest.raises(NotLowRank, match=r"has no 'model\.layers\.0\.self_attn\.o_proj\.lora_A"):
        lora_layers(tensors)
