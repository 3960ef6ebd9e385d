"""MonteCLoRA: samples around A in training, A itself otherwise, and a penalty without data."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

from clients.adapters import ADAPTERS
from clients.adapters.monteclora import Sampler, divergence, mixture, variances
from clients.assignment import PluginChoice
from clients.trainer import train

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
STD, WEIGHTS = (f"layer.lora_monteclora_sampler.{n}_prior" for n in ("std", "expert_weights"))
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


class OneLayer(nn.Module):
    """A base model of one linear layer, 6 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def attached():
    """Return a function that attaches a method to one layer, with B that is not zero."""

    def attach(name: str = "monteclora", **options):
        torch.manual_seed(5)
        backbone = OneLayer()
        adapter = ADAPTERS.get(name).build(r=2, target_modules=["layer"], **options)
        torch.manual_seed(0)
        model = adapter.attach(backbone, {})
        source = torch.Generator().manual_seed(3)
        tensors = adapter.read(model)
        tensors |= {n: torch.randn(tensors[n].shape, generator=source) for n in (A, B)}
        adapter.write(model, tensors)
        return adapter, model

    return attach


@pytest.fixture
def theirs():
    """PEFT's own sampler, of rank 3 and 4 samples."""
    torch.manual_seed(2)
    return MontecloraSampler(6, 3, 4, dirichlet_prior=0.1, buffer_size=1, device="cpu")


def sampler(std: list[float], weights: list[float]) -> Sampler:
    made = Sampler(torch.zeros(len(std), 6), len(weights), scale=1.0)
    made.std_prior.data = torch.tensor(std)
    made.expert_weights_prior.data = torch.tensor(weights)
    return made


def test_evaluation_is_loras_and_draws_nothing(attached):
    _, plain = attached("lora")
    _, ours = attached(sample_scaler=1.0)
    state = torch.get_rng_state()
    assert torch.equal(ours.eval()(X), plain.eval()(X))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_without_samples_is_loras(attached):
    _, plain = attached("lora")
    _, ours = attached(sample_scaler=0.0)
    torch.testing.assert_close(ours.train()(X), plain.train()(X))


def test_the_mean_over_samples_is_loras(attached):
    _, plain = attached("lora")
    _, ours = attached(sample_scaler=0.2)
    ours.train()
    torch.manual_seed(4)
    with torch.no_grad():
        draws = torch.stack([ours(X) for _ in range(3000)])
    spread = draws.std(0)
    assert spread.min() > 0.05
    error = (draws.mean(0) - plain(X)).abs()
    assert (error < 5 * spread / math.sqrt(3000)).all()


def test_training_draws_from_the_seed_and_from_nothing_else(attached):
    _, model = attached(sample_scaler=0.2)
    model.train()

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(X).detach()

    first = drawn(1)
    drawn(9)
    drawn(9)
    assert torch.equal(drawn(1), first)  # so that checkpointing recomputes the same
    assert not torch.equal(drawn(2), first)


def test_variances_and_mixtures_are_those_of_pefts_sampler(theirs):
    wishart, normal = torch.tensor([0.5, 2.0, 1e-6]), torch.tensor([0.3, -1.0, 0.2, 2.0])
    std = theirs.std_prior
    covariance = theirs.wishart_reparameterization(torch.diag(std.exp()), torch.diag(wishart))
    torch.testing.assert_close(variances(std, wishart), covariance.diag())
    weights = theirs.expert_weights_prior
    logits = theirs.dirichlet_reparameterization(weights.exp(), normal)
    torch.testing.assert_close(mixture(weights, normal), logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_samples_have_the_variances_and_weights_sum_to_one():
    made = sampler([0.0, 1.0], [0.1, 0.2, 0.3])
    torch.manual_seed(6)
    with torch.no_grad():
        drawn = [made() for _ in range(3000)]
    samples = torch.stack([s for s, _ in drawn])
    assert samples.shape == (3000, 3, 6, 2)
    # E[chi-squared with 2 degrees of freedom] = 2, times exp(2 * std)
    expected = torch.tensor([2.0, 2 * math.e**2])
    torch.testing.assert_close(samples.square().mean((0, 1, 2)), expected, rtol=0.1, atol=0)
    torch.testing.assert_close(torch.stack([w.sum() for _, w in drawn]), torch.ones(3000))


def test_the_divergence_of_the_prior_from_itself_is_that_of_the_samples_alone():
    # Std 0 and concentrations at the prior: the first two terms are 0. One degree of freedom:
    # N / 2 (E[v] - E[log v] - 1) with E[v] = 1, E[log v] = -Euler's gamma - log 2.
    found = divergence(sampler([0.0], [0.0, 0.0]), dirichlet_prior=1.0)
    assert float(found.detach()) == pytest.approx(0.5772157 + math.log(2), rel=1e-5)


def test_the_divergence_is_the_expectation_of_pefts_terms_with_the_true_dirichlet_term(theirs):
    ours = sampler(theirs.std_prior.tolist(), theirs.expert_weights_prior.tolist())
    alpha = theirs.expert_weights_prior.detach().exp()
    dirichlet = kl_divergence(Dirichlet(alpha), Dirichlet(torch.full((4,), 0.1)))
    std = torch.diag(theirs.std_prior.detach().exp())
    torch.manual_seed(7)
    draws = [
        variances(theirs.std_prior.detach(), torch.randn(3, 3).square().sum(1)) for _ in range(4000)
    ]
    samples = torch.stack([theirs.multivariate_kl(torch.diag(v)) for v in draws]).mean()
    expected = dirichlet + theirs.wishart_kl(std) + samples
    torch.testing.assert_close(divergence(ours, 0.1).detach(), expected, rtol=0.02, atol=0)


def test_pefts_own_dirichlet_term_is_negative_and_its_loss_fails_after_the_backward_pass(theirs):
    # Why the penalty is not PEFT's: a divergence is not negative, and penalties come afterwards.
    assert float(theirs.dirichlet_kl(theirs.expert_weights_prior.detach().exp())) < 0
    samples, weights = theirs.train()()
    (samples.sum() + weights.square().sum()).backward()
    loss, _ = theirs.get_variational_loss()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_gaussian_term_of_peft_is_the_divergence_of_its_samples(theirs):
    covariance = torch.diag(torch.tensor([0.5, 1.0, 2.0]))
    one = kl_divergence(
        MultivariateNormal(torch.zeros(3), covariance),
        MultivariateNormal(torch.zeros(3), torch.eye(3)),
    )
    torch.testing.assert_close(theirs.multivariate_kl(covariance), 4 * one)


def test_the_penalty_is_weighted_and_a_mean_over_layers(attached):
    adapter, model = attached(kl_loss_weight=0.5, num_samples=3)
    found = adapter.penalty(model)
    tensors = adapter.read(model)
    one = divergence(sampler(tensors[STD].tolist(), tensors[WEIGHTS].tolist()), 0.1)
    torch.testing.assert_close(found, 0.5 * one)
    gradients = torch.autograd.grad(found, [adapter.parameters(model)[n] for n in (STD, WEIGHTS)])
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_tensors_of_another_rank_load_as_they_are(attached):
    adapter, model = attached()
    tensors = adapter.read(model)
    wide = {A: torch.ones(4, 6), B: torch.ones(5, 4), STD: torch.full((4,), 0.5)}
    adapter.write(model, {**tensors, **wide})
    assert torch.equal(adapter.read(model)[STD], wide[STD])
    before = model.train()(X)
    before.sum().backward()
    assert adapter.parameters(model)[STD].grad.shape == (4,)


def test_a_client_trains_under_the_penalty(assign):
    weights = (0.0, 0.5)
    found = []
    for weight in weights:
        options = {"r": 2, "layers": [0], "kl_loss_weight": weight, "num_samples": 2}
        made = assign(adapter=PluginChoice("monteclora", options))
        found.append((made, train(replace(made, run=f"run-{weight}")).tensors))
    name = next(n for n in found[0][1] if n.endswith(".std_prior"))
    start = found[0][0].broadcast.tensors[name]
    # The prior is at 0 or below, where the variances are smallest that keep the divergence small.
    assert (found[1][1][name] - start).mean() < -0.1
    assert (found[0][1][name] - start).abs().max() < 0.01
