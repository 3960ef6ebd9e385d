"""Attention of a base model in half precision on a CPU: in float32 where a gradient flows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from clients import models
from clients.assignment import ModelSpec

TOKENS = torch.tensor([[5, 9, 11, 40, 8], [7, 3, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(params=["tiny_encoder", "tiny_decoder"])
def backbone(request):
    kind = "classification" if request.param == "tiny_encoder" else "causal-lm"
    folder = str(request.getfixturevalue(request.param))
    labels = ("x", "y") if kind == "classification" else ()
    return models.load(ModelSpec(folder, kind=kind, labels=labels, compute_dtype="bf16")).backbone


@pytest.fixture
def attended(monkeypatch) -> list[torch.dtype]:
    """The types that torch's fused kernel was given."""
    seen = []
    fused = functional.scaled_dot_product_attention

    def spy(query, *others, **options):
        seen.append(query.dtype)
        return fused(query, *others, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return seen


def first(backbone, inputs, mask=MASK):
    outputs = backbone(inputs_embeds=inputs, attention_mask=mask)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def test_only_what_has_a_gradient_is_attended_to_in_float32(backbone, attended):
    words = backbone.get_input_embeddings()(TOKENS).detach()
    with torch.no_grad():
        plain = first(backbone, words)
    assert set(attended) == {torch.bfloat16}
    attended.clear()
    out = first(backbone, words.requires_grad_())
    out.float().square().sum().backward()
    assert set(attended) == {torch.float32}
    assert out.dtype == torch.bfloat16
    assert words.grad is not None
    torch.testing.assert_close(out.detach(), plain, rtol=0.05, atol=0.05)


def test_what_is_padded_stays_unseen(backbone):
    words = backbone.get_input_embeddings()(TOKENS).detach().requires_grad_()
    both = first(backbone, words)[1, :3]
    alone = first(backbone, words[1:, :3], MASK[1:, :3])[0]
    torch.testing.assert_close(both, alone, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(both.float().sum(), words)
    assert gradient[1, :3].abs().sum() > 0
    assert gradient[1, 3:].abs().sum() == 0


def test_a_model_in_float32_keeps_its_attention(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), kind="classification", labels=("x", "y"))
    assert models.load(spec).backbone.config._attn_implementation == "sdpa"
