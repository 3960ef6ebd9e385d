"""The audit of DP-SGD's own step: below the claim, and above it where the noise is a quarter."""

import re
from dataclasses import replace

import pytest
import torch

from clients import gradients
from clients.accounting import epsilon, noise_for
from clients.assignment import Clipping, DataSpec, PluginChoice, Privacy
from clients.canaries import NoPlaceForCanaries, white_box
from clients.charges import spend_of
from clients.models import load
from clients.noise import insecure_key
from clients.one_run import BadGuesses, lower_bound

DELTA = 1e-5
CANARIES, MADE = 1000, 125


@pytest.fixture
def private(assign):
    """Return a function that makes a private assignment on a larger adapter; its noise fits."""

    def make(claim=2.0, steps=1, rate=1.0, clipping=None, **changes):
        noise = noise_for(claim, DELTA, sample_rate=rate, steps=steps, accountant="rdp")
        privacy = Privacy(noise, 0.7, rate, clipping=clipping or Clipping())
        adapter = {"r": 16, "target_modules": ["query", "key", "value"]}
        chosen = {"adapter": PluginChoice("lora", adapter), "steps": steps, **changes}
        return assign(privacy=privacy, **chosen)

    return make


def attacked(assignment, seed=1):
    """Return the bound that the guesses prove, and the claim."""
    guesses = white_box(assignment, CANARIES, MADE, insecure_key(seed, "audit"))
    return lower_bound(guesses, DELTA), epsilon([spend_of(assignment)], DELTA)


@pytest.fixture
def quartered(monkeypatch):
    """Return a function that breaks the noise."""
    right = gradients.gradient_noise

    def quarter():
        monkeypatch.setattr(gradients, "gradient_noise", lambda *given: right(*given) / 4)

    return quarter


@pytest.mark.parametrize("mode", ["flat", "per-layer", "automatic", "quantile"])
def test_an_audit_stays_below_the_claim_and_rises_above_it_with_a_quarter_of_the_noise(
    private, quartered, mode
):
    assignment = private(claim=2.0, steps=2, clipping=Clipping(mode))
    bound, claim = attacked(assignment)
    assert 0 < bound < claim <= 2.0
    quartered()
    bound, _ = attacked(assignment)
    assert bound > claim


@pytest.mark.parametrize("claim", [1.0, 3.0])
def test_a_quarter_of_the_noise_is_found_at_any_small_claim(private, quartered, claim):
    assignment = private(claim)
    assert attacked(assignment)[0] < claim
    quartered()
    assert attacked(assignment)[0] > claim


def test_a_sample_hides_canaries_too(private):
    bound, claim = attacked(private(claim=2.0, steps=3, rate=0.2))
    assert bound < claim / 2


@pytest.mark.parametrize("mode", ["flat", "per-layer", "automatic", "quantile"])
def test_without_noise_every_guess_is_right(private, mode):
    made = private(clipping=Clipping(mode), adapter=PluginChoice("lora", {"r": 4, "layers": [0]}))
    bare = replace(made, privacy=replace(made.privacy, noise_multiplier=1e-6))
    guesses = white_box(bare, 100, 40, insecure_key(2, "audit"))
    assert (guesses.canaries, guesses.made, guesses.right) == (100, 40, 40)


def test_a_learned_bound_that_canaries_drive_away_comes_back(private):
    learned = Clipping("quantile", rate=200.0)  # as a run of a thousand steps has it with 0.2
    small = PluginChoice("lora", {"r": 4, "layers": [0]})
    made = private(clipping=learned, adapter=small, steps=3)
    bare = replace(made, privacy=replace(made.privacy, noise_multiplier=1e-6))
    assert white_box(bare, 100, 40, insecure_key(2, "audit")).right == 40


def test_canaries_lie_where_the_mask_lets_the_round_train(private):
    made = private()
    name = next(n for n in sorted(made.broadcast.tensors) if n.endswith("lora_B.weight"))
    own = torch.zeros_like(made.broadcast.tensors[name])
    own[0] = 1
    sent = replace(made.broadcast, trainable=re.escape(name), mask={name: own})
    bare = replace(made, broadcast=sent, privacy=replace(made.privacy, noise_multiplier=1e-6))
    assert white_box(bare, 16, 4, insecure_key(3, "audit")).right == 4
    with pytest.raises(
        NoPlaceForCanaries,
        match="17 gradient canaries need as many trained numbers, and there are 16",
    ):
        white_box(bare, 17, 8, insecure_key(3, "audit"))


def test_nobody_s_data_are_read(private):
    made = private()
    nowhere = replace(made, data=DataSpec("jsonl:/nowhere/notes.jsonl"))
    assert white_box(nowhere, 50, 10, insecure_key(4, "audit")).made == 10


def test_the_model_is_as_it_was_afterwards(private):
    made = private()
    white_box(made, 50, 10, insecure_key(5, "audit"))
    backbone = load(made.model).backbone
    assert not any("forward" in vars(module) for module in backbone.modules())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("mode", ["flat", "per-layer"])
def test_canaries_lie_in_whatever_trains(private, mode):
    dora = PluginChoice("dora", {"r": 4, "layers": [0]})
    made = private(adapter=dora, clipping=Clipping(mode))
    assert any("magnitude" in name for name in made.broadcast.tensors)
    bare = replace(made, privacy=replace(made.privacy, noise_multiplier=1e-6))
    assert white_box(bare, 60, 20, insecure_key(6, "audit")).right == 20


def test_more_guesses_than_canaries_are_refused(private):
    with pytest.raises(BadGuesses, match="from 1 to the 50 canaries, got 51"):
        white_box(private(), 50, 51, insecure_key(7, "audit"))
