"""Each way of clipping, by hand and at random: how far one example moves what is released."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients.accounting import epsilon
from clients.assignment import Clipping
from clients.clipping import SMALLEST, Clip, count_noise, gradient_noise, layer_of, moved
from clients.gradients import PrivateGradient
from clients.noise import MARGIN, NoiseStream, insecure_key
from clients.samples import Dense
from strategies.spends import PrivacySpend

QUERY, VALUE = "layer.0.query", "layer.0.value"
NAMES = [f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", f"{VALUE}.lora_B.weight", "head.bias"]
FLAT, LAYERS, QUANTILE = (Clipping(mode) for mode in ("flat", "per-layer", "quantile"))
MODES = [FLAT, LAYERS, QUANTILE, Clipping("automatic"), Clipping("automatic", stability=1e-9)]


def factors(clipping, norms, bound=1.0, names=NAMES):
    return Clip(clipping, names, bound).factors(torch.tensor(norms, dtype=torch.float32))


def test_flat_scales_the_whole_gradient_down_to_the_bound_and_never_up():
    found = factors(FLAT, [[3.0, 0.3], [0.0, 0.0], [4.0, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(found, torch.tensor([[0.2, 1.0]] * 4))


def test_per_layer_gives_each_of_four_layers_half_of_the_bound():
    names = [f"layer.{i}.query.lora_B.weight" for i in range(4)]
    found = factors(LAYERS, [[1.0], [0.1], [5.0], [0.5]], names=names)
    torch.testing.assert_close(found, torch.tensor([[0.5], [1.0], [0.1], [1.0]]))


def test_both_factors_of_an_adapted_layer_are_clipped_as_one():
    assert [layer_of(name) for name in NAMES] == [QUERY, QUERY, VALUE, "head"]
    found = factors(LAYERS, [[3.0], [4.0], [0.0], [0.0]], bound=math.sqrt(3))
    torch.testing.assert_close(found, torch.tensor([[0.2], [0.2], [1.0], [1.0]]))


def test_automatic_gives_every_gradient_nearly_the_bound():
    found = factors(Clipping("automatic", stability=0.01), [[0.0], [0.0], [100.0], [0.01]], 2.0)
    assert found[0].item() == pytest.approx(2 / 100.01, rel=1e-5)
    small = factors(Clipping("automatic", stability=0.01), [[0.0], [0.0], [0.0], [0.01]], 2.0)
    assert 0.01 * small[0].item() == pytest.approx(1.0, rel=1e-5)  # half of the bound


@pytest.mark.parametrize("clipping", MODES)
def test_an_example_with_a_norm_that_is_no_number_counts_as_zero_in_every_layer(clipping):
    bad, endless = float("nan"), float("inf")
    found = factors(
        clipping, [[1.0, bad, 1.0, 3e38], [1.0, 1.0, 1.0, 3e38], [1.0] * 4, [1, 1, endless, 1]]
    )
    assert not found[:, 1:].any()
    assert found[:, 0].all()


_gradient = st.lists(
    st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=len(NAMES), max_size=len(NAMES)
)


@settings(max_examples=200, deadline=None)
@given(
    examples=st.lists(_gradient, min_size=1, max_size=5),
    bound=st.floats(1e-3, 1e3),
    clipping=st.sampled_from(MODES),
)
def test_whatever_the_gradients_one_example_moves_the_sum_by_at_most_the_bound(
    examples, bound, clipping
):
    gradients = torch.tensor(examples, dtype=torch.float32).T  # one number a parameter
    clip = Clip(clipping, NAMES, bound)
    added = (gradients * clip.factors(gradients.abs())).double()
    assert (added.norm(dim=0) <= bound).all()
    alone = gradients[:, :1]
    assert torch.equal(clip.factors(alone.abs())[:, 0], clip.factors(gradients.abs())[:, 0])


@settings(max_examples=200, deadline=None)
@given(
    norms=st.lists(st.floats(0, 10), min_size=1, max_size=20),
    bound=st.floats(0.1, 10),
    sigma=st.floats(0.1, 100),
    share=st.floats(0.001, 0.999),
)
def test_one_example_moves_gradients_and_votes_together_by_one_over_the_noise(
    norms, bound, sigma, share
):
    """The mechanism's whole sensitivity, in units of its noise, is that of one query with sigma."""
    clipping = Clipping("quantile", share=share)
    clip = Clip(clipping, ["w"], bound)
    whole, without = (torch.tensor([x], dtype=torch.float32) for x in (norms, norms[1:]))
    in_votes = float(clip.vote(whole) - clip.vote(without)) / count_noise(clipping, sigma)
    first = whole[:, :1] * clip.factors(whole[:, :1])
    in_gradients = float(first.double()) / bound / gradient_noise(clipping, sigma)
    assert math.hypot(in_votes, in_gradients) <= (1 + 1e-12) / sigma
    assert math.hypot(1 / gradient_noise(clipping, sigma), 0.5 / count_noise(clipping, sigma)) == (
        pytest.approx(1 / sigma)
    )


def test_gradients_and_votes_accounted_one_by_one_cost_what_the_ledger_says_of_both():
    def cost(*noises):
        spends = [
            PrivacySpend(
                "gaussian",
                "example",
                "add-remove",
                {"noise_multiplier": noise, "sample_rate": 1.0, "steps": 10.0},
            )
            for noise in noises
        ]
        return epsilon(spends, 1e-5, "rdp")

    clipping = Clipping("quantile", share=0.3)
    votes = count_noise(clipping, 2.0) / 0.5  # over the votes' sensitivity
    assert cost(gradient_noise(clipping, 2.0), votes) == pytest.approx(cost(2.0), rel=1e-6)
    assert cost(gradient_noise(clipping, 2.0)) < cost(2.0) < cost(2.0, votes)


def test_the_votes_are_halves_for_and_against():
    clip = Clip(QUANTILE, ["w"], 1.0)
    assert clip.vote(torch.tensor([[0.2, 0.9, 1.0, 7.0]])) == 1.0
    assert clip.vote(torch.tensor([[float("nan")]])) == -0.5


@pytest.mark.parametrize(("votes", "within"), [(0.0, 0.5), (2.0, 0.7), (-50.0, 0.0), (50.0, 1.0)])
def test_the_bound_moves_against_the_share_that_is_within_it(votes, within):
    clipping = Clipping("quantile", quantile=0.7, rate=0.5)
    wanted = 3.0 * math.exp(-0.5 * (within - 0.7))
    assert moved(clipping, 3.0, votes, 10) == pytest.approx(wanted)


class Lengths(nn.Module):
    """Its gradient for an example is the example."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)

    def losses(self, x):
        return self.linear(x).squeeze(1)


@pytest.mark.parametrize("begins", [0.01, 100.0])
def test_the_bound_finds_the_quantile_of_the_norms_through_the_noise(begins):
    model, norms = Lengths(), torch.arange(1.0, 101.0)[:, None]
    clipping = Clipping("quantile", quantile=0.8, rate=0.5, share=0.5)
    stream = NoiseStream(insecure_key(0, "clinic-1"), "digest")
    params = {"linear.weight": model.linear.weight}
    private = PrivateGradient(model, params, begins, 1.0, 100.0, stream, clipping=clipping)
    with private:
        for step in range(60):
            private.step([norms[:50], norms[50:]], model.losses, step)
    assert private.bound == pytest.approx(80, rel=0.1)


def test_with_votes_the_gradients_get_the_larger_noise_and_the_bound_a_noise_of_its_own():
    model, sigma = Lengths(), 2.0
    clipping = Clipping("quantile", share=0.75)
    stream = NoiseStream(insecure_key(0, "clinic-1"), "digest")
    params = {"linear.weight": model.linear.weight}
    private = PrivateGradient(model, params, 3.0, sigma, 10.0, stream, clipping=clipping)
    with private:
        private.step([], model.losses, 0)
    noise = (
        stream.normal("linear.weight", 0, (1, 1))
        * (sigma / math.sqrt(1 - 0.75))
        * 3.0
        * MARGIN
        / 10
    )
    torch.testing.assert_close(model.linear.weight.grad, noise.float(), rtol=1e-4, atol=1e-6)
    assert private.bound != 3.0  # by noise alone: nobody learns that nobody was there


def test_per_layer_and_automatic_reach_the_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    params = dict(model.named_parameters())
    x, stream = 10 * torch.randn(1, 3), NoiseStream(insecure_key(0, "clinic-1"), "digest")
    lengths = {}
    for clipping in (FLAT, LAYERS, Clipping("automatic")):
        with PrivateGradient(model, params, 1e-2, 0.0, 1.0, stream, clipping=clipping) as private:
            private.step([x], lambda b: model(b).square().sum(1), 0)
        lengths[clipping.mode] = [float(p.grad.norm()) for p in params.values()]
    assert lengths["per-layer"] == pytest.approx([1e-2 / math.sqrt(2)] * 2, rel=1e-4)
    assert math.hypot(*lengths["flat"]) == pytest.approx(1e-2, rel=1e-4)
    assert 0.99e-2 < math.hypot(*lengths["automatic"]) < 1e-2


@pytest.mark.parametrize("clipping", [*MODES, Clipping("quantile", rate=1e6)])
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e-19, 1e-12, 1e18])
def test_no_gradient_is_so_short_that_it_is_not_clipped(clipping, size):
    gradient = Dense(torch.full((1, 10_000), size))
    bound = moved(clipping, SMALLEST, 0.0, 1.0)

    clip = Clip(clipping, ["head.weight"], bound)
    added = gradient.weighted(clip.factors(gradient.norms()[None])[0])

    assert float(added.double().norm()) <= bound * MARGIN


@pytest.mark.parametrize(
    ("clipping", "bound"), [(FLAT, 1e-30), (Clipping("automatic", stability=1e-30), 1.0)]
)
def test_a_bound_below_every_norm_that_can_be_measured_is_refused(clipping, bound):
    with pytest.raises(ValueError, match="nothing would be clipped"):
        Clip(clipping, NAMES, bound)
