"""The start-up check of a private assignment: which engine is believed, and why not another."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from clients import models, per_example
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.data import Batch
from clients.models import TaskModel
from clients.per_example import ENGINES, engines_of, measuring
from clients.samples import Dense, NoPerExampleGradient
from clients.taps import tapped
from clients.verification import chosen

LABELS = ("x", "y", "z")


@pytest.fixture
def attach(tiny_encoder):
    """Attach a fresh adapter to the tiny encoder, under a head; detached afterwards."""
    made = []

    def attach(name="lora", dtype="float32", checkpointing=False, **options):
        spec = ModelSpec(
            str(tiny_encoder),
            "classification",
            labels=LABELS,
            compute_dtype=dtype,
            gradient_checkpointing=checkpointing,
        )
        adapter, backbone = ADAPTERS.get(name).build(**options), models.load(spec).backbone
        torch.manual_seed(0)
        model = TaskModel(adapter.attach(backbone, {}), spec).train()
        made.append((adapter, backbone))
        return model, adapter

    yield attach
    for adapter, backbone in made:
        adapter.detach(backbone).eval()


def batch():
    ids = torch.tensor([[5, 9, 11, 40], [6, 7, 0, 0], [8, 8, 30, 0]])
    return Batch(ids, (ids > 0).long(), torch.tensor([0, 2, 1]))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def found_by(model, engines=tuple(ENGINES)):
    def losses(one):
        return model.example_losses(model(one), one)

    return chosen(model, trainable(model), engines, batch(), losses)


@pytest.mark.parametrize("name", [n for n in ADAPTERS.names() if n != "alora"])
def test_an_adapters_first_engine_is_chosen(attach, name, tiny_options):
    model, adapter = attach(name, **tiny_options.get(name, {}))
    engines = engines_of(adapter.capabilities)

    assert found_by(model, engines) == engines[0]


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_dropout_and_its_draws_are_no_reason_to_go_on(attach, name):
    model, adapter = attach(name, dropout=0.5)

    assert found_by(model, engines_of(adapter.capabilities)) != "alone"


def test_samples_that_are_drawn_for_each_example_leave_it_to_the_last_engine(attach):
    model, adapter = attach("monteclora", dropout=0.5, sample_scaler=0.3)

    assert found_by(model, engines_of(adapter.capabilities)) == "alone"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_rounding_of_a_base_in_lower_precision_is_no_reason_to_go_on(attach, dtype):
    model, _ = attach(dtype=dtype)

    assert found_by(model) == "taps"


@pytest.mark.parametrize(("name", "expected"), [("lora", "taps"), ("dora", "vmap")])
def test_gradient_checkpointing_is_no_reason_to_go_on(attach, name, expected):
    model, adapter = attach(name, checkpointing=True)

    assert found_by(model, engines_of(adapter.capabilities)) == expected


def test_everything_is_as_before(attach):
    model, _ = attach("monteclora", dropout=0.5)
    params = trainable(model)
    for p in params.values():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in params.items()}
    state = torch.get_rng_state()

    found_by(model)

    assert all(torch.equal(p, before[name]) for name, p in params.items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params.values())
    assert all(module.training for module in model.head.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Wrong:
    """Taps that are off by a factor in one parameter's gradient of the second example."""

    def __init__(self, taps, name, factor):
        self.taps, self.name, self.factor = taps, name, factor

    def gradients(self, batch, losses_fn, *, check):
        found = self.taps.gradients(batch, losses_fn, check=check)
        name = next(n for n in found if self.name in n)
        off = found[name].dense().clone()
        off[1] *= self.factor
        return found | {name: Dense(off)}


@pytest.fixture
def off_by(monkeypatch):
    """Replace the first engine by one that is off by a factor."""

    def replace(name, factor):
        @contextmanager
        def wrong(model, params):
            with tapped(model, params) as taps:
                yield Wrong(taps, name, factor)

        monkeypatch.setattr(per_example, "ENGINES", {**ENGINES, "taps": wrong})

    return replace


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1 + 1e-6, "taps"), (1 + 1e-4, "hooks"), (-1.0, "hooks"), (float("nan"), "hooks")],
)
def test_an_engine_that_is_off_by_more_than_rounding_is_passed_over(
    attach, off_by, factor, expected
):
    model, _ = attach()
    off_by("head.weight", factor)

    assert found_by(model) == expected


def test_what_has_no_gradient_at_the_start_is_compared_too(attach, off_by):
    # LoRA's B is zero, and so is A's gradient: any multiple of it would pass for the true one
    model, _ = attach()
    off_by("lora_A", 3.0)

    assert found_by(model) == "hooks"


def test_which_engine_is_passed_over_is_logged_with_the_reason(attach, off_by, caplog):
    model, _ = attach()
    off_by("lora_B", 1.5)
    with caplog.at_level(logging.WARNING):
        found_by(model)

    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("engine taps does not measure this model: ")
    assert "lora_B" in text
    assert "1e-05" in text
    assert "0.5" not in text  # how far off depends on the data


class Twice(nn.Module):
    """Uses its weight past the module that engines sit on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def losses(self, x):
        return (self.linear(x) + nn.functional.linear(x, self.linear.weight) ** 2).sum(1)


def test_what_no_other_engine_measures_is_left_to_microbatches_of_one():
    model = Twice().train()
    x = torch.ones(2, 3)

    assert chosen(model, trainable(model), list(ENGINES), x, model.losses) == "alone"


def test_a_model_that_no_engine_measures_is_refused_with_the_last_reason():
    model = Twice().train()
    x = torch.ones(2, 3)
    with pytest.raises(NoPerExampleGradient, match=r"linear\.weight: what is measured of one"):
        chosen(model, trainable(model), ["taps", "hooks"], x, model.losses)
    assert all(p.grad is None for p in model.parameters())


def test_an_adapter_is_served_by_the_engine_it_declares_and_those_after_it():
    assert engines_of({"dp-hooks", "merge"}) == ["hooks", "vmap", "alone"]
    assert engines_of({"merge"}) == []


@pytest.mark.parametrize(("engine", "refused"), [("taps", True), ("vmap", True), ("alone", False)])
def test_int8_off_the_cpu_which_looks_for_outliers_in_whole_batches_needs_examples_alone(
    engine, refused
):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False, threshold=6.0, device="meta")
    model = nn.ModuleDict({"base": layer.requires_grad_(False), "head": nn.Linear(4, 2)})

    raises = pytest.raises(NoPerExampleGradient, match="base is quantised to int8")
    with raises if refused else nullcontext(), measuring(model, trainable(model), engine):
        pass
