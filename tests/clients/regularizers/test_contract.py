"""What every regularizer keeps to; a new one is tested by existing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from clients.assignment import ModelSpec, PluginChoice, Privacy
from clients.regularizers import (
    REGULARIZERS,
    Beginning,
    Regularizer,
    namespaced,
    observes,
    recall,
    takes_part,
)
from clients.trainer import train
from strategies.base import Update

EVERY = pytest.mark.parametrize("name", REGULARIZERS.names())

JUDGES = pytest.mark.parametrize(
    "name",
    [
        name
        for name in REGULARIZERS.names()
        if REGULARIZERS.get(name).factory.example_loss is not Regularizer.example_loss
    ],
)
"""Those that add to an example's loss."""


def adapter(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("encoder.0.query", "encoder.0.value"):
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, 12, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(5, 2, generator=generator)
        tensors[f"{layer}.scaling"] = torch.tensor(2.0)
    tensors["head.weight"] = torch.randn(3, 5, generator=generator)
    return tensors


def trainable(tensors):
    return {k: nn.Parameter(v.clone()) for k, v in tensors.items() if not k.endswith(".scaling")}


def copies(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def build(name):
    return REGULARIZERS.get(name).build()


def told(regularizer, when, seed):
    """Return what two clients might say in a reading: of the shapes that are asked for."""
    params = adapter(seed=1)
    shapes = regularizer.parts(when, params, trainable(params))
    generator = torch.Generator().manual_seed(seed)
    for client, count in (("a", 3), ("b", 9)):
        parts = {n: torch.rand(s, generator=generator) for n, s in sorted(shapes.items())}
        yield Update(client, 1, "", parts, count)


def remembering(name, seed=0):
    """Return the memory after a whole task, with the readings that the method needs."""
    regularizer, memory, params = build(name), {}, adapter(seed=1)
    if takes_part(regularizer, "prepare"):
        memory = regularizer.combine("prepare", params, memory, told(regularizer, "prepare", seed))
    memory = regularizer.consolidate(params, memory)
    if takes_part(regularizer, "consolidate"):
        answers = told(regularizer, "consolidate", seed)
        memory = regularizer.combine("consolidate", params, memory, answers)
    return memory


def observed(regularizer, memory):
    params, before = adapter(seed=3), adapter(seed=4)
    grads = {key: torch.ones_like(tensor) for key, tensor in params.items()}
    return regularizer.observe(grads, before, params, memory)


def test_o_lora_and_proximal_are_there():
    assert {"o-lora", "proximal"} <= set(REGULARIZERS.names())


@EVERY
def test_it_says_what_it_is_and_where_it_is_from(name):
    plugin = REGULARIZERS.get(name)
    assert plugin.summary.endswith(".")
    assert plugin.source
    assert not any(option.required for option in plugin.options.values())


@EVERY
def test_its_names_are_regular_expressions(name):
    regularizer = build(name)
    names = [*adapter(), "encoder.0.query.lora_diag"]
    assert any(re.fullmatch(regularizer.acts_on, name) for name in names)
    re.compile(regularizer.freezes)


@EVERY
def test_its_penalty_is_a_finite_non_negative_scalar_with_a_finite_gradient(name):
    params = trainable(adapter())
    value = build(name).penalty(params, adapter(seed=2), remembering(name))
    if value is None:
        return
    assert value.shape == ()
    assert value >= 0
    found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    assert any(g is not None for g in found)
    assert all(g.isfinite().all() for g in found if g is not None)


@EVERY
def test_its_penalty_is_zero_before_anything_was_trained_or_remembered(name):
    fresh = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in adapter().items()}
    value = build(name).penalty(trainable(fresh), fresh, {})
    assert value is None or value == 0


@EVERY
def test_its_memory_round_trips_through_its_namespace(name):
    memory = remembering(name)
    kept = namespaced(memory, name)
    assert all(key.startswith(f"{name}/") for key in kept)
    assert same(recall(kept, name), memory)
    assert recall(kept, "another") == {}
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in memory.values())


@EVERY
def test_what_a_run_begins_with_is_plain_tensors_that_go_when_its_task_is_consolidated(name):
    """But for what the task leaves: a run never finds the beginning of another."""
    regularizer = build(name)
    for start in (Beginning(adapter()), Beginning(adapter(), False, (0, 2))):
        begun = regularizer.begin(start, remembering(name))
        assert all(type(t) is torch.Tensor and not t.requires_grad for t in begun.values())
        assert same(recall(namespaced(begun, name), name), begun)
        after = regularizer.consolidate(adapter(), begun)
        assert after.keys() == regularizer.consolidate(adapter(), remembering(name)).keys()


@EVERY
def test_a_teacher_is_a_whole_adapter_and_only_where_something_was_learned_before(name):
    regularizer = build(name)
    assert regularizer.teacher(regularizer.begin(Beginning(adapter()), {})) == {}
    begun = regularizer.begin(Beginning(adapter(), first=False, known=(0, 1)), {})
    taught = regularizer.teacher(begun)
    assert not taught or same(taught, adapter())


@JUDGES
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_what_it_adds_to_an_examples_loss_is_clipped_with_it_exactly(
    name, kind, method, assign, tiny_decoder
):
    """A private step, whose clip binds no example, is the plain one: as is its loss term."""
    causal = ModelSpec(str(tiny_decoder), kind, max_length=16)
    rows = [{"text": f"{word} cat sings"} for word in ("a", "the", "one")]
    adapter = PluginChoice(method, {"r": 2})
    base = assign(adapter=adapter)
    if kind == "causal-lm":
        base = assign(rows, model=causal, adapter=adapter)
    generator = torch.Generator().manual_seed(4)
    learned = {
        n: t if n.endswith(".scaling") else t + torch.randn(t.shape, generator=generator) / 2
        for n, t in base.broadcast.tensors.items()
    }
    known = () if kind == "causal-lm" else (0, 2)
    begun = build(name).begin(Beginning(learned, first=False, known=known), {})

    def step(privacy):
        count = 10 if kind == "classification" else 3
        asked = replace(
            base,
            regularizers=(PluginChoice(name),),
            memory=namespaced(begun, name),
            optimizer=PluginChoice("sgd", {"lr": 0.1}),
            steps=1,
            batch_size=count,
            num_examples=count,
            privacy=privacy,
            run=f"{privacy}",
        )
        sent = asked.broadcast.tensors
        return {n: t - sent[n] for n, t in train(asked).tensors.items()}

    unbound = Privacy(noise_multiplier=1e-12, max_grad_norm=1e4, sample_rate=1.0)
    plain, private = step(None), step(unbound)
    for tensor, expected in plain.items():
        torch.testing.assert_close(private[tensor], expected, rtol=1e-3, atol=1e-5)


@EVERY
def test_consolidating_live_parameters_remembers_plain_tensors(name):
    memory = build(name).consolidate(trainable(adapter()), {})
    assert not any(tensor.requires_grad for tensor in memory.values())


@EVERY
def test_it_keeps_names_shapes_and_types_of_an_adapter(name):
    found = build(name).initialise(adapter(), remembering(name))
    assert found.keys() == adapter().keys()
    for key, tensor in adapter().items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype)


@EVERY
def test_it_changes_none_of_its_arguments(name):
    regularizer, memory, params, reference = build(name), remembering(name), adapter(), adapter(2)
    grads = {key: torch.ones_like(tensor) for key, tensor in params.items()}
    given = [memory, params, reference, grads]
    before = [copies(x) for x in given]
    regularizer.initialise(params, memory)
    regularizer.begin(Beginning(params, first=False, known=(0,)), memory)
    regularizer.penalty(trainable(params), reference, memory)
    regularizer.project(grads, memory)
    regularizer.observe(grads, reference, params, memory)
    regularizer.consolidate(params, memory)
    regularizer.consolidate_observed(params, memory)
    for when in ("prepare", "consolidate"):
        regularizer.combine(when, params, memory, told(regularizer, when, 0))
    assert all(same(x, y) for x, y in zip(given, before, strict=True))


@EVERY
def test_it_is_deterministic(name):
    memory = remembering(name)
    assert same(remembering(name), memory)
    one, two = (build(name).initialise(adapter(), memory) for _ in range(2))
    assert same(one, two)


@EVERY
@pytest.mark.parametrize("when", ["prepare", "consolidate"])
def test_it_says_what_it_wants_of_a_reading_that_it_takes_part_in(name, when):
    regularizer, params = build(name), adapter()
    shapes = regularizer.parts(when, params, trainable(params))
    assert shapes or not takes_part(regularizer, when)
    assert all(isinstance(side, int) for shape in shapes.values() for side in shape)
    assert all(type(shape) is tuple for shape in shapes.values())


@EVERY
def test_what_it_observes_it_can_say_of_every_tensor_that_travels(name):
    regularizer, memory = build(name), remembering(name)
    grown = observed(regularizer, memory)
    assert (grown.keys() != memory.keys()) == observes(regularizer)
    assert all(grown[key] is memory[key] for key in memory)  # what it adds has names of its own
    params = {n: t for n, t in adapter().items() if not n.endswith(".scaling")}
    for known in (grown, memory):  # trained, and never trained
        found = regularizer.consolidate_observed(params, known)
        if found:
            asked = regularizer.parts("consolidate", params, params)
            assert {n: tuple(t.shape) for n, t in found.items()}.items() <= dict(asked).items()
        assert all(tensor.isfinite().all() for tensor in found.values())


@EVERY
def test_what_it_remembers_of_a_reading_follows_from_what_clients_said(name):
    regularizer = build(name)
    if not any(takes_part(regularizer, when) for when in ("prepare", "consolidate")):
        return
    assert not same(remembering(name, seed=1), remembering(name, seed=2))
    if regularizer.anchored:
        params = trainable(adapter())
        assert regularizer.penalty(params, adapter(), remembering(name)) > 0
