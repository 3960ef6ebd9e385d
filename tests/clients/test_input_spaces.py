"""Spaces of inputs: what tasks use, as little of it as holds the energy, and what they leave."""

import pytest
import torch

from clients.input_spaces import (
    FREE,
    USED,
    NoFreeDirection,
    free_directions,
    leading_free,
    outside,
    summed,
    total,
    with_task,
)
from strategies.base import Update

WIDTH = 12


def inputs(dimensions, seed=0, count=50, noise=0.0):
    """Rows in these coordinates, each half as long as the one before it."""
    source = torch.Generator().manual_seed(seed)
    rows = noise * torch.randn(count, WIDTH, generator=source)
    for place, dimension in enumerate(dimensions):
        rows[:, dimension] += torch.randn(count, generator=source) / 2**place
    return rows


def moments(rows):
    return rows.double().T @ rows.double()


def learned(*tasks, energy=1.0):
    memory = {}
    for rows in tasks:
        memory = with_task("q", moments(rows), energy, memory)
    return memory


def basis(*dimensions):
    return torch.eye(WIDTH)[list(dimensions)]


def test_it_is_the_span_of_what_a_task_uses():
    used = learned(inputs([1, 4]))["q" + USED]
    assert used.shape == (2, WIDTH)
    torch.testing.assert_close(used @ used.T, torch.eye(2))
    torch.testing.assert_close(used.T @ used, basis(1, 4).T @ basis(1, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_it_is_the_smallest_that_holds_the_energy(energy):
    rows = inputs([0, 1, 2, 3], noise=0.05)
    used = learned(rows, energy=energy)["q" + USED]
    kept = (rows @ used.T).square().sum() / rows.square().sum()
    fewer = torch.linalg.svdvals(rows).square()[: len(used) - 1].sum() / rows.square().sum()
    assert kept >= energy - 1e-6
    assert fewer < energy


def test_directions_that_are_known_are_not_remembered_twice():
    first = learned(inputs([1, 4]))
    again = with_task("q", moments(inputs([4, 1], seed=5)), 1.0, first)
    assert torch.equal(again["q" + USED], first["q" + USED])
    more = with_task("q", moments(inputs([1, 7])), 1.0, first)["q" + USED]
    assert torch.equal(more[:2], first["q" + USED])
    torch.testing.assert_close(more[2].abs(), basis(7)[0], rtol=0, atol=1e-6)


def test_what_is_free_is_remembered_once_that_is_less():
    tasks = [inputs([0, 1, 2, 3]), inputs([4, 5, 6]), inputs([6, 7])]
    half, most, more = learned(tasks[0]), learned(*tasks[:2]), learned(*tasks)
    assert [*half] == ["q" + USED]
    assert [*most] == [*more] == ["q" + FREE]
    assert len(more["q" + FREE]) == 4
    spanned = torch.eye(WIDTH)[8:]
    torch.testing.assert_close(
        more["q" + FREE].T @ more["q" + FREE], spanned.T @ spanned, rtol=0, atol=1e-6
    )


def test_both_forms_leave_the_same_outside():
    memory = learned(inputs([0, 1, 2], noise=0.1), energy=0.95)
    free = free_directions("q", WIDTH, memory)
    torch.testing.assert_close(free @ free.T, torch.eye(len(free)).double())
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    one, other = (outside("q", rows, m) for m in (memory, {"q" + FREE: free.float()}))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert (memory["q" + USED] @ one.T).abs().max() < 1e-6


def test_without_memory_everything_is_outside():
    rows = torch.randn(5, WIDTH)
    assert torch.equal(outside("q", rows, {}), rows)


def test_a_new_task_gets_the_free_directions_that_it_uses_most():
    memory = learned(inputs([0, 1, 2]))
    sizes = torch.zeros(WIDTH)
    sizes[[0, 3, 5, 9]] = torch.tensor([9.0, 2.0, 4.0, 1.0])
    rows = leading_free("q", torch.diag(sizes), 2, memory)
    torch.testing.assert_close(rows, basis(5, 3).double(), rtol=0, atol=1e-5)
    assert (memory["q" + USED].double() @ rows.T).abs().max() < 1e-6


def test_directions_that_a_task_does_not_use_are_free_ones_too():
    memory = learned(inputs([0, 1, 2]))
    rows = leading_free("q", moments(inputs([0, 1])), 3, memory)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())
    assert (memory["q" + USED].double() @ rows.T).abs().max() < 1e-6


def test_a_rank_without_as_many_free_directions_is_refused():
    memory = learned(inputs(range(10)))
    with pytest.raises(NoFreeDirection, match=r"q has 12 .* use 10: 2 are left, rank 3 needs 3"):
        leading_free("q", moments(inputs([0])), 3, memory)


def test_clients_sums_are_the_moments_of_all_their_data():
    parts = [inputs([0, 1]), inputs([5], seed=1), inputs([2], seed=2)]
    updates = [
        Update(c, 1, "", summed([{"q": rows}]), len(rows))
        for c, rows in zip("abc", parts, strict=True)
    ]
    torch.testing.assert_close(total(updates)["q"], moments(torch.cat(parts)), rtol=1e-5, atol=1e-4)
    batches = [{"q": rows[:20]} for rows in parts] + [{"q": rows[20:]} for rows in parts]
    torch.testing.assert_close(
        summed(batches)["q.moments"], moments(torch.cat(parts)).float(), rtol=1e-5, atol=1e-4
    )


def test_nothing_is_remembered_of_inputs_that_are_zero():
    assert learned(torch.zeros(3, WIDTH))["q" + USED].shape == (0, WIDTH)
