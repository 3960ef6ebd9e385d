"""LoRA-SB: what is trained is a core, and its span is where it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from clients.adapters.lora_sb import leading
from clients.assignment import ModelSpec, PluginChoice
from clients.gradients import PrivateGradient
from clients.noise import NoiseStream
from clients.session import opened, returned_names
from clients.starting import initial_tensors
from clients.trainer import train
from strategies.base import Broadcast
from strategies.plugins import BadOptions

QUERY = "encoder.layer.0.attention.self.query"
A, B, CORE = (f"{QUERY}.lora_{part}.weight" for part in ("A", "B", "core"))


def choice(**options) -> PluginChoice:
    return PluginChoice("lora-sb", {"r": 3, "layers": [0], "target_modules": ["query"], **options})


@pytest.fixture
def task(assign):
    return assign(adapter=choice())


def test_it_starts_with_drawn_orthonormal_factors_around_nothing(task, assign):
    tensors = task.broadcast.tensors
    torch.testing.assert_close(tensors[A] @ tensors[A].T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(tensors[B].T @ tensors[B], torch.eye(3), atol=1e-6, rtol=0)
    assert not tensors[CORE].any()
    other = assign(adapter=choice(), seed=1).broadcast.tensors
    assert not torch.allclose(other[A], tensors[A])


def test_a_client_trains_and_returns_the_core_and_the_head_alone(task):
    update = train(task)
    assert sorted(update.tensors) == [CORE, "head.bias", "head.weight"] == returned_names(task)
    assert update.tensors[CORE].abs().max() > 0


def test_the_cores_gradient_is_the_weights_within_the_span(task):
    """dL/dC = s B^T (dL/dW) A^T."""
    tensors = dict(task.broadcast.tensors)
    tensors[CORE] = torch.tensor([[0.3, -1.0, 0.0], [0.0, 0.2, 0.5], [1.0, 0.0, 0.1]])
    with opened(task) as session:
        ids = torch.tensor([[5, 9, 11, 40]])
        backbone = session.model.backbone
        session.adapter.write(backbone, tensors)
        weight = backbone.get_submodule(QUERY).get_base_layer().weight.requires_grad_(True)
        out = backbone(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        out[..., ::2].square().sum().backward()
        dense, weight.grad = weight.grad, None
        weight.requires_grad_(False)
        core = session.adapter.parameters(backbone)[CORE].grad
    expected = tensors[f"{QUERY}.scaling"] * tensors[B].T @ dense @ tensors[A].T
    torch.testing.assert_close(core, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_decides_the_span_and_the_first_step(assign, task):
    asked = replace(
        assign(adapter=choice(init="gradient", init_step=0.1, alpha=6.0), broadcast=Broadcast({})),
        action="init",
        num_examples=8,
    )
    tensors = initial_tensors(asked)
    torch.testing.assert_close(tensors[A] @ tensors[A].T, torch.eye(3), atol=1e-5, rtol=0)
    core = tensors[CORE].diagonal()
    assert torch.equal(tensors[CORE], torch.diag(core))
    assert torch.equal(core, core.sort(descending=True).values)
    # the step is the best approximation of a matrix of -0.1 and 0.1
    change = tensors[f"{QUERY}.scaling"] * tensors[B] @ tensors[CORE] @ tensors[A]
    assert 0 < change.norm() <= 0.1 * change.numel() ** 0.5
    still = replace(asked, adapter=choice(init="gradient"))
    assert not initial_tensors(still)[CORE].any()


def test_the_leading_triples_of_a_diagonal_are_its_largest_entries():
    u, s, vh = leading(torch.diag(torch.tensor([1.0, -5.0, 3.0])), 2)
    assert s.tolist() == [5.0, 3.0]
    assert vh.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert u.T.tolist() == [[0, -1, 0], [0, 0, 1]]


def test_an_adapter_of_another_rank_is_written_with_its_core(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("x", "y"))
    backbone = models.load(spec).backbone
    big, small = (ADAPTERS.get("lora-sb").build(r=r, target_modules=["query"]) for r in (5, 2))
    tensors = big.read(big.attach(backbone, {}))
    big.detach(backbone)
    model = small.attach(backbone, {})
    small.write(model, tensors)
    again = small.read(model)
    small.detach(model)
    assert again[CORE].shape == (5, 5)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_step_without_a_gradient_is_refused():
    with pytest.raises(BadOptions, match=r"got 0\.1 with init 'orthogonal'; set init: gradient"):
        ADAPTERS.get("lora-sb").build(init_step=0.1)


def test_a_private_step_clips_and_releases_the_core(task):
    with opened(task) as session:
        model = session.model.backbone.train()
        live = {CORE: session.adapter.parameters(model)[CORE]}
        engine = PrivateGradient(model, live, 1e-3, 0.0, 2.0, NoiseStream(b"k" * 32, "d"))

        def losses(ids: torch.Tensor) -> torch.Tensor:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            return out[..., ::2].square().flatten(1).sum(1)

        with engine:
            engine.step([torch.tensor([[5, 9, 11], [6, 11, 30]])], losses, 0)
        assert 0 < live[CORE].grad.norm() <= 1e-3
        model.eval()
