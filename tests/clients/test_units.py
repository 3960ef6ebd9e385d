"""A unit's examples are clipped as one: against plain autograd, unit by unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from clients.assignment import Clipping
from clients.gradients import PrivateGradient
from clients.noise import NoiseStream, insecure_key
from clients.per_example import ENGINES
from clients.samples import Dense, Factored
from clients.units import OfUnits, of_units, packed

CLIP = 0.05
SIZES = [3, 1, 2]


class Tiny(nn.Module):
    """A BERT of one layer with trained queries, and a head so wide that its norms are ghosts'."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.backbone = BertModel(config, add_pooling_layer=False).requires_grad_(False)
        self.backbone.encoder.layer[0].attention.self.query.requires_grad_(True)
        self.head = nn.Linear(16, 200)

    def losses(self, batch):
        tokens, labels = batch
        hidden = self.backbone(input_ids=tokens).last_hidden_state
        return functional.cross_entropy(self.head(hidden.mean(1)), labels, reduction="none")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny().train()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def examples(count):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (count, 7), generator=generator)
    return tokens, torch.randint(0, 200, (count,), generator=generator)


def of_each(model, batch, sizes):
    """Yield each unit's mean gradient, by autograd on the mean of its losses."""
    tokens, labels = batch
    for some, wanted in zip(tokens.split(sizes), labels.split(sizes), strict=True):
        loss = model.losses((some, wanted)).mean()
        yield torch.autograd.grad(loss, list(trained(model).values()))


def private(model, parts, clipping=Clipping(), engine="taps"):  # noqa: B008  (frozen)
    stream = NoiseStream(insecure_key(0, "clinic-1"), "digest")
    step = PrivateGradient(
        model, trained(model), CLIP, 0.0, 1.0, stream, clipping=clipping, engine=engine
    )
    with step:
        step.step(parts, model.losses, 0)
    return {name: p.grad.clone() for name, p in trained(model).items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_equals_a_loop_over_units_with_plain_autograd(model, engine):
    batch = examples(sum(SIZES))
    wanted = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for found in of_each(model, batch, SIZES):
        norm = torch.cat([g.flatten() for g in found]).norm()
        assert norm > CLIP
        for name, gradient in zip(wanted, found, strict=True):
            wanted[name] += gradient * CLIP / norm

    got = private(model, [OfUnits(batch, SIZES)], engine=engine)

    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-8)


def test_which_units_share_a_microbatch_makes_no_difference(model):
    tokens, labels = examples(sum(SIZES))
    whole = private(model, [OfUnits((tokens, labels), SIZES)])

    parted = private(
        model, [OfUnits((tokens[:3], labels[:3]), [3]), OfUnits((tokens[3:], labels[3:]), [1, 2])]
    )

    for name, gradient in whole.items():
        torch.testing.assert_close(parted[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", ["flat", "per-layer", "automatic", "quantile"])
def test_a_unit_adds_no_more_than_the_bound_however_many_examples_it_has(model, mode):
    added = private(model, [OfUnits(examples(6), [6])], Clipping(mode=mode))

    assert 0 < torch.cat([g.flatten() for g in added.values()]).norm() <= CLIP * (1 + 1e-5)


def test_the_examples_of_one_unit_clipped_apart_would_exceed_it(model):
    """What the bound is for: without the units the same batch moves the sum further."""
    apart = private(model, [examples(6)])

    assert torch.cat([g.flatten() for g in apart.values()]).norm() > CLIP * 1.5


def test_an_infinite_gradient_takes_its_whole_unit_out_and_no_other():
    samples = Dense(torch.tensor([[1.0], [float("inf")], [2.0], [4.0]]))

    found = of_units(samples, [2, 2])

    assert found.norms().isfinite().tolist() == [False, True]
    assert found.weighted(torch.tensor([0.0, 1.0])).tolist() == [3.0]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    positions=st.integers(1, 3),
    narrow=st.sampled_from([2, 40]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_never_formed_gives_the_same_means_as_what_is(sizes, positions, narrow):
    torch.manual_seed(0)
    count = sum(sizes)
    samples = Factored(torch.randn(count, positions, narrow), torch.randn(count, positions, 40))

    found, wanted = of_units(samples, sizes), of_units(Dense(samples.dense()), sizes)

    assert isinstance(found, Factored) == (
        max(sizes) == 1 or max(sizes) * positions * (narrow + 40) < narrow * 40
    )
    assert len(found) == len(sizes)
    torch.testing.assert_close(found.dense(), wanted.dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norms(), wanted.norms(), rtol=1e-4, atol=1e-5)


@given(
    sizes=st.lists(st.integers(1, 5), max_size=12),
    size=st.integers(5, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_units_are_packed_whole_and_each_once(sizes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator).tolist()
    drawn = [tuple(order.pop() for _ in range(n)) for n in sizes]
    drawn_lengths = torch.randint(1, 50, (sum(sizes),), generator=generator).tolist()
    lengths = dict(enumerate(drawn_lengths))

    parts = list(packed(drawn, lengths, size))

    assert sorted(unit for part in parts for unit in part) == sorted(drawn)
    assert all(0 < sum(len(unit) for unit in part) <= size for part in parts)
