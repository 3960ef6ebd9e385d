import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies.subspaces import balanced, completed, extended, nothing
from strategies.tensors import Factors

EYE = torch.eye(12, dtype=torch.float64)


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    features=st.integers(1, 12),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_a_basis_extended_part_by_part_is_that_of_all_at_once(features, widths, seed):
    parts = [drawn(seed + i, features, width) for i, width in enumerate(widths)]
    space = nothing(features)
    for part in parts:
        space = extended(space, part)
    u, s, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    assert space.lost == 0
    assert_close(space.values, s, rtol=0, atol=1e-10)
    assert_close(space.basis.T @ space.basis, EYE[: len(s), : len(s)], rtol=0, atol=1e-10)
    assert_close((space.basis.T @ u).abs(), EYE[: len(s), : len(s)], rtol=0, atol=1e-6)


def test_what_is_cut_off_is_told_as_lost_energy():
    columns = drawn(0, 9, 6)
    s = torch.linalg.svdvals(columns).square()
    space = extended(nothing(9), columns, 2)
    assert space.basis.shape == (9, 2)
    assert space.kept == pytest.approx(float(s[:2].sum()))
    assert space.lost == pytest.approx(float(s[2:].sum()))
    more = extended(space, drawn(1, 9, 1), 2)
    total = float(columns.square().sum() + drawn(1, 9, 1).square().sum())
    assert more.kept + more.lost == pytest.approx(total)


def test_columns_that_repeat_add_no_direction():
    columns = drawn(0, 9, 3)
    space = extended(extended(nothing(9), columns), columns @ drawn(1, 3, 5))
    assert space.basis.shape == (9, 3)


def test_uncentred_directions_hold_the_mean_of_the_columns():
    """Two columns that differ by their mean's negative alone: centred, one direction is lost."""
    columns = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    basis = extended(nothing(3), columns).basis
    assert_close(basis @ (basis.T @ columns.double()), columns.double())


def test_directions_do_not_depend_on_how_a_product_is_written():
    b, a, turn = drawn(0, 7, 3), drawn(1, 3, 5), drawn(2, 3, 3)
    one = balanced(Factors(a, b, torch.tensor(2.0)))
    other = balanced(Factors(turn @ a * 8, b @ turn.inverse(), torch.tensor(0.25)))
    assert_close(one, other, rtol=0, atol=1e-9)
    assert_close(one[0] @ one[1].T, 2 * b @ a)


def test_both_sides_of_a_balanced_product_weigh_alike():
    columns, rows = balanced(Factors(drawn(1, 3, 5), drawn(0, 7, 3), torch.tensor(1.0)))
    assert_close(columns.T @ columns, rows.T @ rows, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(features=st.integers(1, 12), data=st.data(), seed=st.integers(0, 2**16))
def test_random_directions_are_orthonormal_and_orthogonal_to_those_that_are_there(
    features, data, seed
):
    k = data.draw(st.integers(0, features))
    rank = data.draw(st.integers(k, features))
    basis = extended(nothing(features), drawn(seed, features, k)).basis
    whole = completed(basis, rank, torch.Generator().manual_seed(seed))
    assert torch.equal(whole[:, :k], basis)
    assert_close(whole.T @ whole, EYE[:rank, :rank], rtol=0, atol=1e-10)
    again = completed(basis, rank, torch.Generator().manual_seed(seed))
    assert torch.equal(whole, again)
