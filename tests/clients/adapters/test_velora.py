"""VeLoRA: LoRA's function, and a gradient of A from compressed inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clients.adapters import ADAPTERS
from strategies.plugins import BadOptions

IN, OUT, GROUPS = 6, 5, 3
A, B = "layer.lora_A.weight", "layer.lora_B.weight"
X = torch.randn(7, IN, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(7, OUT, generator=torch.Generator().manual_seed(2))


class OneLayer(nn.Module):
    """A base model of one linear layer, 6 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def attached():
    """Return a function that attaches a method to one layer, with B that is not zero."""

    def attach(name: str, seed: int = 0, **options):
        torch.manual_seed(5)
        backbone = OneLayer()
        adapter = ADAPTERS.get(name).build(r=2, target_modules=["layer"], **options)
        torch.manual_seed(seed)
        model = adapter.attach(backbone, {}).train()
        source = torch.Generator().manual_seed(3)
        tensors = adapter.read(model)
        tensors |= {n: torch.randn(tensors[n].shape, generator=source) for n in (A, B)}
        adapter.write(model, tensors)
        return adapter, model

    return attach


def gradients(adapter, model) -> dict[str, torch.Tensor]:
    (model(X) * TARGET).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.parameters(model).items()}


def test_training_computes_what_lora_computes(attached):
    _, plain = attached("lora")
    _, ours = attached("velora", num_groups=GROUPS)
    assert torch.equal(ours(X), plain(X))


def test_the_gradient_of_a_is_that_of_the_reconstructed_input(attached):
    adapter, model = attached("velora", num_groups=GROUPS, scale=0.5)
    found = gradients(adapter, model)
    v = model.layer.lora_velora_embed["default"]
    torch.testing.assert_close(v.norm(), torch.tensor(1.0))
    groups = X.view(7, GROUPS, 2)  # of <x_g, v> v, by hand
    reconstructed = 0.5 * ((groups @ v).unsqueeze(-1) * v).view(7, IN)
    b = adapter.parameters(model)[B].detach()
    torch.testing.assert_close(found[A], (TARGET @ b).T @ reconstructed)


def test_the_gradient_of_b_is_exact(attached):
    plain, ours = attached("lora"), attached("velora", num_groups=GROUPS)
    torch.testing.assert_close(gradients(*ours)[B], gradients(*plain)[B])


def test_a_group_for_every_feature_makes_the_gradient_exact(attached):
    plain, ours = attached("lora"), attached("velora", num_groups=IN)
    torch.testing.assert_close(gradients(*ours)[A], gradients(*plain)[A])


def test_the_gradient_is_right_on_average_when_scaled_by_a_groups_features(attached):
    exact = gradients(*attached("lora"))[A]
    seeds = range(150)
    found = [gradients(*attached("velora", s, num_groups=GROUPS, scale=2.0))[A] for s in seeds]
    error = torch.stack(found).mean(0) - exact
    assert error.norm() < 0.15 * exact.norm()
    assert (found[0] - exact).norm() > 0.3 * exact.norm()


def test_the_projection_is_a_function_of_the_seed_and_not_of_the_data(attached):
    def projection(seed: int, times: int) -> torch.Tensor:
        adapter, model = attached("velora", seed, num_groups=GROUPS)
        for _ in range(times):
            gradients(adapter, model)
        return model.layer.lora_velora_embed["default"].clone()

    assert torch.equal(projection(1, times=0), projection(1, times=2))
    assert not torch.equal(projection(1, times=0), projection(2, times=0))


def test_what_cannot_be_a_number_of_groups_is_refused():
    with pytest.raises(BadOptions, match="num_groups must be >= 1, got 0"):
        ADAPTERS.get("velora").build(num_groups=0)
