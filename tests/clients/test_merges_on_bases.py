"""Merges on bases whose weights are transposed (Conv1D) or quantised: the sum, as on any other."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2Model

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from strategies.merges import MERGES
from strategies.tensors import lora_layers

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
WEIGHTS = [1.5, -0.5]
SUMS = {"cat": {}, "svd": {"rank": 5}, "task-arithmetic": {}, "eigenlorax": {"energy": 1.0}}


def trained(backbone, targets):
    """Return two adapters of unequal rank and scaling, the second of them rsLoRA."""
    made = []
    for seed, (name, rank, alpha) in enumerate([("lora", 2, 6.0), ("rslora", 3, 2.0)]):
        torch.manual_seed(seed)
        adapter = ADAPTERS.get(name).build(r=rank, alpha=alpha, target_modules=targets)
        tensors = adapter.read(adapter.attach(backbone, {}))
        adapter.detach(backbone)
        drawn = {n: 0.3 * torch.randn(t.shape) for n, t in tensors.items() if ".lora_B." in n}
        made.append({**tensors, **drawn})
    return made


def hidden(backbone, targets, tensors, underlay=None):
    """Return what the base with an adapter gives, over another one if there is one."""
    adapter = ADAPTERS.get("lora").build(target_modules=targets)
    adapter.write(adapter.attach(backbone, underlay or {}), tensors)
    with torch.no_grad():
        found = backbone.eval()(input_ids=IDS)[0]
    adapter.detach(backbone)
    return found


@pytest.mark.parametrize("name", SUMS)
def test_on_transposed_layers_a_merge_is_the_base_with_the_sum_in_its_weights(name):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=0.2
    )
    backbone, targets = GPT2Model(config).eval(), ["c_attn", "c_fc"]  # 8 to 24, and 8 to 32
    adapters = trained(backbone, targets)
    found = hidden(backbone, targets, MERGES.get(name).build(adapters, WEIGHTS, **SUMS[name]))
    with torch.no_grad():
        before = backbone(input_ids=IDS)[0]
        for weight, adapter in zip(WEIGHTS, adapters, strict=True):
            for layer, one in lora_layers(adapter).items():
                backbone.get_submodule(layer).weight += weight * one.scaling * (one.b @ one.a).T
        expected = backbone(input_ids=IDS)[0]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - before).norm() / before.norm()) > 0.05


@pytest.mark.parametrize("name", SUMS)
def test_on_a_quantised_base_a_merge_does_what_both_do_one_over_the_other(name, tiny_decoder):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(id=str(tiny_decoder), kind="causal-lm", quantization="int8")
    backbone, targets = models.load(spec).backbone, ["q_proj", "v_proj"]
    first, second = trained(backbone, targets)
    both = hidden(backbone, targets, first, underlay=second)
    merged = MERGES.get(name).build([first, second], [1.0, 1.0], **SUMS[name])
    assert_close(hidden(backbone, targets, merged), both, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both, hidden(backbone, targets, first), atol=0.05)
