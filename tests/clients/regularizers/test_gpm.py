"""GPM and InfLoRA: new adapters do not react to the inputs of earlier tasks."""

import pytest
import torch

from clients import input_spaces
from clients.input_spaces import NoFreeDirection
from clients.regularizers import REGULARIZERS
from strategies.base import Update

BOTH = pytest.mark.parametrize("name", ["gpm", "inflora"])
A = "q.lora_A.weight"


def built(name, **options):
    return REGULARIZERS.get(name).build(**options)


def drawn(rank=3, width=16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, width, generator=source),
        "q.lora_B.weight": torch.randn(5, rank, generator=source),
        "q.scaling": torch.tensor(1.0),
    }


def inputs(seed, dimensions=6, width=16):
    """Rows that lie in so many dimensions, but for a little of all others."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(80, dimensions, generator=source)
    rows = rows @ torch.randn(dimensions, width, generator=source)
    return rows + 0.05 * torch.randn(80, width, generator=source)


def answer(*parts):
    return [
        Update(str(i), 1, "", input_spaces.summed([{"q": rows}]), 80)
        for i, rows in enumerate(parts)
    ]


@pytest.fixture
def after(request):
    """Return a function that makes the memory of a method after a task."""

    def memory(name, rows, before=None, **options):
        return built(name, **options).combine("consolidate", drawn(), before or {}, answer(rows))

    return memory


@BOTH
@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_a_new_adapter_reacts_to_old_inputs_no_more_than_the_threshold_allows(
    after, name, threshold
):
    old, new, method = inputs(1), inputs(2), built(name)
    memory = after(name, old, threshold=threshold)
    if name == "inflora":
        memory = method.combine("prepare", drawn(), memory, answer(new))
    adapter = method.initialise(drawn(), memory)
    reaction = torch.linalg.matrix_norm(old @ adapter[A].T)
    most = torch.linalg.matrix_norm(adapter[A], ord=2) * torch.linalg.matrix_norm(old)
    assert reaction <= (1 - threshold) ** 0.5 * most + 1e-5
    assert torch.linalg.matrix_norm(new @ adapter[A].T) > 0.1 * torch.linalg.matrix_norm(new)
    assert (memory["q.used"] @ adapter[A].T).abs().max() < 1e-5


@BOTH
def test_the_threshold_grows_with_tasks_up_to_one(after, name):
    options = {"threshold": 0.6, "growth": 0.3}
    memory, held = {}, []
    for seed in (1, 2, 3):
        rows = inputs(seed, dimensions=2)
        memory = after(name, rows, memory, **options)
        inside = rows - input_spaces.outside("q", rows, memory)
        held.append(float(inside.square().sum() / rows.square().sum()))
        assert memory["tasks"] == seed
    assert held[0] >= 0.6
    assert held[1] >= 0.9
    assert held[2] == pytest.approx(1.0, abs=1e-5)


@BOTH
def test_a_first_task_is_not_held_back(name):
    method, adapter = built(name), drawn()
    assert torch.equal(method.initialise(adapter, {})[A], adapter[A])
    assert torch.equal(method.project(adapter, {})[A], adapter[A])


def test_gpm_keeps_every_step_of_a_outside_whatever_the_gradient(after):
    memory, method = after("gpm", inputs(1)), built("gpm")
    adapter = method.initialise(drawn(), memory)
    parameter = torch.nn.Parameter(adapter[A].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.5, momentum=0.9, weight_decay=0.01)
    for seed in range(5):
        gradients = {A: drawn(seed=seed)[A], "q.lora_B.weight": torch.ones(5, 3)}
        projected = method.project(gradients, memory)
        assert projected["q.lora_B.weight"] is gradients["q.lora_B.weight"]
        parameter.grad = projected[A]
        optimizer.step()
    assert not torch.allclose(parameter, adapter[A])
    assert (memory["q.used"] @ parameter.T).abs().max() < 1e-5


def test_gpm_refuses_an_adapter_that_has_no_room(after):
    memory = after("gpm", inputs(1, dimensions=16), threshold=0.9999)
    with pytest.raises(NoFreeDirection, match="Lower the rank or the threshold"):
        built("gpm").initialise(drawn(rank=16), memory)


def test_inflora_starts_from_what_the_new_task_puts_in_and_forgets_the_design_after_it(after):
    old, new, method = inputs(1), inputs(2), built("inflora")
    memory = method.combine("prepare", drawn(), after("inflora", old), answer(new[:40], new[40:]))
    rows = method.initialise(drawn(), memory)[A]
    torch.testing.assert_close(rows @ rows.T, torch.eye(3) / 3, rtol=0, atol=1e-5)
    outside = input_spaces.outside("q", new, memory)
    principal = torch.linalg.svd(outside, full_matrices=False).Vh[:3] / 3**0.5
    torch.testing.assert_close(rows.T @ rows, principal.T @ principal, rtol=0, atol=1e-4)
    kept = method.combine("consolidate", drawn(), memory, answer(new))
    assert not any("design" in key for key in kept)
