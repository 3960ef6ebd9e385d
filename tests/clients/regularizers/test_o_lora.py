"""O-LoRA: penalty by hand, orthogonal starts, and tasks in sequence."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from clients.regularizers import REGULARIZERS
from clients.regularizers.o_lora import OLoRA, SubspaceFull
from strategies.plugins import BadOptions

A, S = "query.lora_A.weight", "query.subspace"
SOFT, HARD = OLoRA(), OLoRA(form="hard")


def kaiming(rank, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5


def adapter(a):
    return {A: a, "query.lora_B.weight": torch.zeros(3, len(a)), "query.scaling": torch.tensor(2.0)}


def overlap(a, b):
    return (a.double() @ b.double().T).abs().max().item()


def test_the_penalty_is_the_weighted_sum_of_absolute_overlaps():
    memory = {S: torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    a = torch.tensor([[1.0, -2.0, 5.0], [0.5, 0.0, 5.0]])
    assert OLoRA(weight=0.5).penalty({A: a}, {}, memory) == 0.5 * (1 + 2 + 0.5)
    assert OLoRA(weight=0.5, reduction="mean").penalty({A: a}, {}, memory) == 0.5 * 3.5 / 4


def test_the_penalty_adds_up_over_layers():
    memory = {S: torch.eye(3)[:1], "value.subspace": torch.eye(3)[1:2]}
    params = {A: torch.ones(1, 3), "value.lora_A.weight": 2 * torch.ones(1, 3)}
    assert OLoRA(weight=1.0).penalty(params, {}, memory) == 3


def test_the_penalty_is_zero_where_the_rows_are_orthogonal_and_nowhere_else():
    memory = SOFT.consolidate(adapter(kaiming(2, 8)), {})
    orthogonal = HARD.initialise(adapter(kaiming(2, 8, seed=1)), memory)
    assert SOFT.penalty(orthogonal, {}, memory) < 1e-6
    assert SOFT.penalty(adapter(kaiming(2, 8, seed=1)), {}, memory) > 0.01


def test_the_gradient_goes_to_the_new_factor_alone():
    memory = {S: torch.eye(4)[:2]}
    params = {k: nn.Parameter(v) for k, v in adapter(kaiming(2, 4)).items()}
    SOFT.penalty(params, {}, memory).backward()
    assert params[A].grad[:, :2].abs().min() > 0
    assert not params[A].grad[:, 2:].any()
    assert params["query.lora_B.weight"].grad is None


def test_descending_the_penalty_makes_the_rows_orthogonal():
    memory = {S: torch.eye(6)[:2]}
    a = nn.Parameter(kaiming(2, 6))
    start = overlap(a.detach(), memory[S])
    for _ in range(200):
        (gradient,) = torch.autograd.grad(SOFT.penalty({A: a}, {}, memory), [a])
        a.data -= 0.005 * gradient
    assert overlap(a.detach(), memory[S]) < 0.05 * start


@pytest.mark.parametrize(
    ("regularizer", "params", "memory"),
    [
        (SOFT, adapter(kaiming(2, 4)), {}),
        (HARD, adapter(kaiming(2, 4)), {S: torch.eye(4)[:1]}),
        (OLoRA(weight=0.0), adapter(kaiming(2, 4)), {S: torch.eye(4)[:1]}),
        (SOFT, {"query.lora_B.weight": torch.ones(3, 2)}, {S: torch.eye(4)[:1]}),
    ],
    ids=["first task", "hard form", "weight 0", "A is frozen"],
)
def test_there_is_no_penalty_where_there_is_nothing_to_act_on(regularizer, params, memory):
    assert regularizer.penalty(params, {}, memory) is None


def test_the_hard_form_starts_in_the_complement():
    memory = HARD.consolidate(adapter(kaiming(4, 32)), {})
    given = adapter(kaiming(4, 32, seed=1))
    found = HARD.initialise(given, memory)
    assert overlap(found[A], memory[S]) < 1e-6
    assert torch.allclose(found[A].norm(dim=1), given[A].norm(dim=1))
    directions = torch.nn.functional.normalize(found[A].double(), dim=1)
    assert torch.allclose(directions @ directions.T, torch.eye(4).double(), atol=1e-6)
    assert found["query.lora_B.weight"] is given["query.lora_B.weight"]


def test_the_hard_form_stays_near_the_given_rows():
    memory = HARD.consolidate(adapter(kaiming(2, 256)), {})
    given = adapter(kaiming(2, 256, seed=1))
    found = HARD.initialise(given, memory)
    assert (torch.nn.functional.cosine_similarity(found[A], given[A]) > 0.9).all()


def test_the_hard_form_draws_anew_where_the_same_seed_gave_an_earlier_task_the_same_rows():
    given = adapter(kaiming(4, 32))
    memory = HARD.consolidate(given, {})
    found = HARD.initialise(given, memory)
    assert overlap(found[A], memory[S]) < 1e-6
    assert torch.linalg.matrix_rank(found[A]) == 4


def test_a_first_task_starts_as_it_is():
    given = adapter(kaiming(2, 8))
    assert HARD.initialise(given, {}) == given
    assert SOFT.initialise(given, {S: torch.eye(8)[:2]}) == given


def test_the_hard_form_can_use_the_last_directions_and_says_when_there_are_too_few():
    memory = {S: torch.eye(8)[:5]}
    assert overlap(HARD.initialise(adapter(kaiming(3, 8)), memory)[A], memory[S]) < 1e-6
    with pytest.raises(SubspaceFull, match=r"query has 8 input dimensions .* 3 are left, rank 4"):
        HARD.initialise(adapter(kaiming(4, 8)), memory)


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_the_memory_is_an_orthonormal_basis_of_the_rows(form):
    a = 3 * kaiming(4, 16)
    memory = OLoRA(form=form).consolidate(adapter(a), {})
    basis = memory[S]
    assert set(memory) == {S}
    assert (basis.shape, basis.dtype) == ((4, 16), torch.float32)
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-6)
    assert torch.allclose(a @ basis.T @ basis, a, atol=1e-5)


def test_the_memory_spans_what_a_refactored_adapter_spans():
    a = kaiming(3, 16)
    rotation = torch.linalg.qr(kaiming(3, 3, seed=1)).Q
    one, two = (HARD.consolidate(adapter(x), {})[S] for x in (a, rotation @ a))
    assert torch.allclose(one.T @ one, two.T @ two, atol=1e-6)


def test_the_memory_does_not_grow_with_directions_it_holds():
    memory = HARD.consolidate(adapter(kaiming(3, 16)), {})
    again = HARD.consolidate(adapter(2 * kaiming(3, 16).flip(0)), memory)
    assert torch.equal(again[S], memory[S])
    one_more = torch.cat([kaiming(3, 16)[:2], kaiming(1, 16, seed=5)])
    assert HARD.consolidate(adapter(one_more), memory)[S].shape == (4, 16)


def test_a_zero_factor_adds_no_direction():
    assert HARD.consolidate(adapter(torch.zeros(2, 8)), {})[S].shape == (0, 8)


def test_layers_that_a_task_does_not_have_are_remembered():
    memory = {"value.subspace": torch.eye(4)[:1]}
    assert torch.equal(
        HARD.consolidate(adapter(kaiming(2, 8)), memory)["value.subspace"], torch.eye(4)[:1]
    )


def test_three_tasks_in_sequence_are_mutually_orthogonal():
    memory, tasks = {}, []
    for seed in range(3):
        task = HARD.initialise(adapter(kaiming(8, 64, seed)), memory)
        memory = HARD.consolidate(task, memory)
        tasks.append(task[A])
    assert memory[S].shape == (24, 64)
    for i in range(3):
        for j in range(i):
            assert overlap(tasks[i], tasks[j]) < 1e-6


def test_the_soft_form_needs_a_trained_factor_and_the_hard_form_a_frozen_one():
    assert re.fullmatch(SOFT.acts_on, A)
    assert not re.fullmatch(SOFT.acts_on, "query.lora_B.weight")
    assert SOFT.freezes == ""
    assert re.fullmatch(HARD.freezes, A)
    assert not re.fullmatch(HARD.freezes, "query.lora_B.weight")
    assert re.fullmatch(HARD.acts_on, "query.lora_B.weight")


@pytest.mark.parametrize("options", [{"form": "firm"}, {"weight": -1.0}, {"reduction": "max"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BadOptions, match=f"{next(iter(options))} must be"):
        REGULARIZERS.get("o-lora").build(**options)
