"""Per-example gradients of adapted layers that are more than plain linear ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clients.gradients import plain_step
from clients.per_example import measuring
from clients.samples import NoPerExampleGradient
from clients.vmapped import adapted_layers

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(1))


class Causal(nn.Module):
    """A tiny Llama with DoRA on all of its linear layers, B not zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        lora = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
        self.backbone = get_peft_model(LlamaForCausalLM(config), lora)
        for name, p in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)

    def losses(self, tokens):
        logits = self.backbone(input_ids=tokens).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return each.mean(1)


class Gated(nn.Module):
    """A frozen linear layer with a gate that trains, behind dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.gate = nn.ParameterDict({"default": nn.Parameter(torch.ones(3))})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + self.gate["default"] * self.dropout(x)


class Outer(nn.Module):
    """A gated layer, called in some way."""

    def __init__(self, call, **options):
        super().__init__()
        self.layer = Gated(**options)
        self.call = call

    def losses(self, x):
        self.outputs = self.call(self.layer, x)
        return self.outputs.flatten(1).sum(1)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, batch):
    with measuring(model, trainable(model), "vmap") as engine:
        found = engine.gradients(batch, model.losses, check=True)
    return {name: samples.dense() for name, samples in found.items()}


def assert_those_of_single_examples(model, found, batch, tolerance=1e-5):
    for index in range(len(batch)):
        plain_step(trainable(model), [batch[index : index + 1]], model.losses, 1)
        for name, p in trainable(model).items():
            error = (found[name][index] - p.grad).norm()
            assert error <= tolerance * p.grad.norm(), name
            p.grad = None


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_dora_is_exact_with_and_without_checkpointing(reentrant):
    model = Causal().train()
    if reentrant is not None:
        backbone = model.backbone.base_model.model
        backbone.activation_checkpointing_enable({"use_reentrant": reentrant})
        backbone.enable_input_require_grads()
    found = gradients(model, TOKENS)
    assert sum("lora_magnitude" in name for name in found) == 14
    assert_those_of_single_examples(model, found, TOKENS)


def test_autocast_is_that_of_the_forward_pass():
    model = Causal().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(TOKENS)
        found = gradients(model, TOKENS)
        assert losses.dtype == torch.float32
        assert_those_of_single_examples(model, found, TOKENS, 5e-2)


def test_a_layer_that_is_used_twice_has_the_gradients_of_both_uses():
    model = Outer(lambda layer, x: layer(layer(x).tanh())).train()
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2))
    assert_those_of_single_examples(model, gradients(model, x), x)


def test_dropout_is_drawn_for_each_example_and_again_the_same_in_the_backward_pass():
    model = Outer(lambda layer, x: layer(x), dropout=0.5).train()
    x = torch.ones(64, 3)
    torch.manual_seed(4)
    found = gradients(model, x)["layer.gate.default"]
    after = torch.rand(1)

    kept = model.outputs - model.layer.base(x)  # the gate is 1: what dropout let through
    torch.testing.assert_close(found, kept.detach())
    assert len(found.unique(dim=0)) == 8  # of all ways to drop three features
    torch.manual_seed(4)
    model.losses(x)
    assert not torch.equal(torch.rand(1), torch.zeros(1))
    torch.manual_seed(4)
    gradients(model, x)
    assert torch.equal(torch.rand(1), after)


def test_only_inputs_are_kept_for_the_backward_pass():
    model = Causal().train()
    sizes = []
    with (
        measuring(model, trainable(model), "vmap"),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ),
    ):
        model.losses(TOKENS)
    own = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: own.append(t.numel()) or t, lambda t: t
    ):
        model.losses(TOKENS)
    assert sum(sizes) < sum(own)


def test_the_model_is_as_before_afterwards():
    model = Causal().train()
    before = {m: dict(vars(m)) for m in model.modules()}
    gradients(model, TOKENS)
    assert all(vars(m).keys() == kept.keys() for m, kept in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_an_adapted_layer_is_the_smallest_with_frozen_parameters():
    model = Causal()
    kinds = {type(layer).__name__ for layer in adapted_layers(model)}
    assert kinds == {"Linear"}
    assert len(adapted_layers(model)) == 14


def test_what_trains_in_no_adapted_layer_is_named():
    model = nn.ModuleDict({"gate": nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})})
    with pytest.raises(NoPerExampleGradient, match="gate trains, and is neither a linear layer"):
        adapted_layers(model)


class Scaled(Gated):
    """Takes a second tensor, of which it is not known whose it is."""

    def forward(self, x, scale):
        return scale * Gated.forward(self, x)


def test_a_layer_that_takes_two_tensors_is_refused():
    model = Outer(lambda layer, x: layer(x, x)).train()
    model.layer = Scaled()
    with pytest.raises(NoPerExampleGradient, match="must take one tensor"):
        gradients(model, torch.ones(2, 3))


class Branching(Gated):
    """Does what depends on an example's values."""

    def forward(self, x):
        return Gated.forward(self, x if x.sum() > 0 else -x)


def test_what_vmap_cannot_run_is_left_to_another_engine():
    model = Outer(lambda layer, x: layer(x)).train()
    model.layer = Branching()
    with pytest.raises(NoPerExampleGradient, match=r"an example at a time \(RuntimeError\)"):
        gradients(model, torch.ones(2, 3))
