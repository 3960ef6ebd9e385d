"""Another adapter's outputs from the model that is being trained: exact, and without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients import data
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from clients.session import opened


def batch_of(session, assignment):
    found = data.examples(assignment.data, assignment.model)
    return data.collate(data.encode(found, session.base.tokenizer, assignment.model), 0)


def another(session, seed=1):
    """Return the session's tensors with other values wherever something could train."""
    generator, live = torch.Generator().manual_seed(seed), session.parameters()
    return {
        name: t + torch.randn(t.shape, generator=generator) / 5 if name in live else t
        for name, t in session.read().items()
    }


def test_they_are_those_of_a_model_that_has_the_other_adapter(assign):
    assignment = assign(adapter=PluginChoice("lora", {"r": 2, "dropout": 0.5}))
    with opened(assignment) as session:
        session.write(assignment.broadcast.tensors)
        batch, teacher = batch_of(session, assignment), another(session)
        session.model.train()
        found = session.outputs_with(teacher, batch)
        session.write(teacher)
        session.model.eval()
        assert torch.equal(found, session.model(batch).detach())


def test_training_leaves_the_base_model_in_the_mode_in_which_it_was_loaded(assign):
    with opened(assign()) as session:
        session.model.train()
    assert not any(module.training for module in session.base.backbone.modules())


def test_a_step_is_the_same_whether_somebody_asked_for_them_or_not(assign):
    """Also in the middle of one: between the forward and the backward pass."""
    assignment = assign(adapter=PluginChoice("lora", {"r": 2, "dropout": 0.5}))
    gradients = []
    for asked in (False, True):
        with opened(assignment) as session:
            session.write(assignment.broadcast.tensors)
            session.model.train()
            batch, live = batch_of(session, assignment), session.parameters()
            torch.manual_seed(0)
            loss = session.model.example_losses(session.model(batch), batch).sum()
            if asked:
                session.outputs_with(another(session), batch)
            drawn = torch.rand(3)
            loss.backward()
            gradients.append([drawn, *(p.grad.clone() for p in live.values())])
            assert session.model.training
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_teacher_of_another_rank_is_refused(assign):
    assignment = assign()
    with opened(assignment) as session:
        teacher = {n: t[:1] if ".lora_A." in n else t for n, t in session.read().items()}
        with pytest.raises(ValueError, match=r"lora_A.weight must be \[2, 32\] in a teacher"):
            session.outputs_with(teacher, batch_of(session, assignment))


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_can_be_a_teacher(assign, tiny_decoder, tiny_options, name):
    """All that its outputs depend on is swapped: they are those after a write."""
    options = {"r": 4, **tiny_options.get(name, {})}
    plugin = ADAPTERS.get(name)
    options = {k: v for k, v in options.items() if k in plugin.options}
    assignment = assign(
        [{"text": "the cat sings a round"}] * 2,
        model=ModelSpec(str(tiny_decoder), "causal-lm", max_length=16),
        adapter=PluginChoice(name, options),
    )
    with opened(replace(assignment, seed=5)) as session:
        batch, teacher = batch_of(session, assignment), another(session)
        found = session.outputs_with(teacher, batch)
        session.write(teacher)
        session.model.eval()
        with torch.no_grad():
            assert torch.allclose(found, session.model(batch), atol=1e-5)
