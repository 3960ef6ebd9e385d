"""MonteCLoRA: in training A is a Monte-Carlo sample around its mean; a posterior is learned for it.

Source: Bayesian reparameterization of low-rank adaptation, arXiv 2411.04358. In training
``A + sum_n w_n N_n`` takes the place of A. The variances of the ``num_samples`` Gaussian samples
``N_n`` are drawn from a Wishart distribution that ``std_prior`` scales, the weights ``w_n`` from a
Dirichlet distribution with the concentrations ``exp(expert_weights_prior)``. Evaluation, merging
and export use A, the mean.

The forward pass is PEFT's. Its sampler is replaced, with the same distributions:

* PEFT draws samples ahead and keeps them, so that gradient checkpointing would recompute a forward
  pass with other samples; here each forward pass draws its own, from torch's seeded generator.
* PEFT's loss of the last forward pass is to be added to the loss before the backward pass, and
  fails after it. A penalty, which sees no data, is added afterwards here; this one is the
  divergence itself, its expectation over the Wishart draw in closed form.
* PEFT's Dirichlet term has a wrong sign, and is negative where a divergence cannot be; here it is
  torch's. PEFT's ``use_entropy`` is left out: it adds an unweighted constant of the draw.

With DP the examples of a microbatch share a draw, as they do without; with ``dropout`` besides, an
example is measured by itself and has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from clients import lora_layers
from clients.adapters.peft import TRAINED, Method, PeftLora, plugin
from strategies.base import Tensors
from strategies.plugins import Plugin, Range

MONTECLORA = Method(
    "monteclora",
    "LoRA trained on Monte-Carlo samples of A, whose posterior is learned too.",
    "2411.04358",
    {},
    frozenset({"merge", "dp-vmap", "zero-b", "trains-a", "unquantised-base"}),
)
_SMALLEST_VARIANCE = 1e-3


@dataclass(frozen=True, slots=True)
class MonteCLoRA(PeftLora):
    """LoRA with a learned posterior of A.

    Attributes:
        num_samples: samples a forward pass, at least 2.
        sample_scaler: of the samples' standard deviations; 0 is LoRA, but for the penalty.
        kl_loss_weight: of the penalty, the divergence of the posterior from the prior; 0 is none.
        dirichlet_prior: concentration of the prior of the mixture weights; large prefers even ones.
    """

    num_samples: Annotated[int, Range(2)] = 8
    sample_scaler: Annotated[float, Range(0)] = 1e-4
    kl_loss_weight: Annotated[float, Range(0)] = 1e-5
    dirichlet_prior: Annotated[float, Range(0, open_low=True)] = 0.1

    def settings(self, targets: Mapping[str, nn.Module]) -> Mapping[str, Any]:
        """Return PEFT's settings, for a sampler as small as it makes them: it is replaced."""
        from peft import MontecloraConfig

        return {"monteclora_config": MontecloraConfig(num_samples=1, buffer_size=1)}

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place).

        Raises:
            BadOptions: if a target does not exist or a rank exceeds its layer.
            UnsupportedUnderlay: if there is an underlay.
        """
        model = PeftLora.attach(self, backbone, underlay)
        for layer in lora_layers.adapted(model, TRAINED).values():
            layer.lora_monteclora_sampler[TRAINED] = Sampler(
                layer.lora_A[TRAINED].weight, self.num_samples, self.sample_scaler
            )
        return model

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the weighted divergence of the posterior from the prior, a mean over layers."""
        layers = lora_layers.adapted(model, TRAINED).values()
        samplers = [layer.lora_monteclora_sampler[TRAINED] for layer in layers]
        divergences = torch.stack([divergence(s, self.dirichlet_prior) for s in samplers])
        return self.kl_loss_weight * divergences.mean()


class Sampler(nn.Module):
    """Draws what is added to A in a forward pass of training.

    Args:
        mean: A, ``[rank, in_features]``; its shape and device count.
        num_samples: N, >= 2.
        scale: of the samples, >= 0.

    Attributes:
        std_prior: ``[rank]``, logarithms of the scales of the variances.
        expert_weights_prior: ``[N]``, logarithms of the mixture weights' concentrations.
    """

    def __init__(self, mean: Tensor, num_samples: int, scale: float) -> None:
        super().__init__()
        self.in_features = mean.shape[1]
        self.scale = scale
        self.std_prior = nn.Parameter(torch.rand(mean.shape[0], device=mean.device))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, device=mean.device))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return samples ``[N, in_features, rank]`` and their weights ``[N]``, which sum to 1."""
        rank, device = len(self.std_prior), self.std_prior.device
        # the diagonal of a Wishart draw with rank degrees of freedom, and that is all that counts
        wishart = torch.randn(rank, rank, device=device).square().sum(1)
        normal = torch.randn(len(self.expert_weights_prior), self.in_features, rank, device=device)
        samples = self.scale * normal * variances(self.std_prior, wishart).sqrt()
        logits = torch.randn(len(self.expert_weights_prior), device=device)
        return samples, mixture(self.expert_weights_prior, logits)


def variances(std_prior: Tensor, wishart: Tensor) -> Tensor:
    """Return the variances ``[rank]`` of the samples.

    Args:
        std_prior: ``[rank]``, logarithms of scales.
        wishart: ``[rank]``, the diagonal of a Wishart draw.
    """
    return (torch.exp(2 * std_prior) * wishart).clamp(min=_SMALLEST_VARIANCE)


def mixture(expert_weights_prior: Tensor, normal: Tensor) -> Tensor:
    """Return mixture weights ``[N]``: a Dirichlet draw in its softmax approximation.

    Args:
        expert_weights_prior: ``[N]``, logarithms of concentrations.
        normal: ``[N]``, standard normal draws.
    """
    number, inverse = len(expert_weights_prior), torch.exp(-expert_weights_prior)
    spread = inverse * (1 - 2 / number) + inverse.sum() / number**2
    centre = expert_weights_prior - expert_weights_prior.mean()
    return torch.softmax(centre + spread.sqrt() * normal, dim=-1)


def divergence(sampler: Sampler, dirichlet_prior: float) -> Tensor:
    """Return the Kullback-Leibler divergence of a posterior from its prior, a scalar >= 0.

    The sum of three: of the mixture weights from a Dirichlet of ``dirichlet_prior``, of the Wishart
    of the variances from the unscaled one, and of N Gaussian samples from standard normal ones, in
    expectation over the variances (but for their lower bound).
    """
    logs, scales = sampler.std_prior, torch.exp(2 * sampler.std_prior)
    rank, number = len(logs), len(sampler.expert_weights_prior)
    weights = Dirichlet(torch.exp(sampler.expert_weights_prior))
    even = Dirichlet(torch.full_like(sampler.expert_weights_prior, dirichlet_prior))
    wishart = rank / 2 * (scales - 2 * logs - 1).sum()
    # a diagonal entry is chi-squared with rank degrees of freedom: its mean, and its logarithm's
    log_mean = math.log(2) + float(torch.digamma(torch.tensor(rank / 2)))
    samples = number / 2 * (rank * scales - 2 * logs - log_mean - 1).sum()
    return kl_divergence(weights, even) + wishart + samples


def plugins() -> Iterator[Plugin]:
    """Yield MonteCLoRA."""
    yield plugin(MONTECLORA, MonteCLoRA)
