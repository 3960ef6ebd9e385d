"""What differs between adapters, against dense linear algebra and numbers made by hand."""

import math

import pytest
import torch

from strategies.comparison import (
    compare_layers,
    compare_tensors,
    effective_rank,
    principal_angles,
)
from strategies.tensors import Factors, NotLowRank


def factors(seed, rank=3, out=7, width=5, scaling=1.0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    return Factors(a, b, torch.tensor(scaling))


def dense(layer):
    return (layer.scaling * layer.b @ layer.a).double()


def line(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(("one", "other"), [(factors(1), factors(2, rank=2, scaling=0.5))])
def test_norms_change_and_rank_are_those_of_the_dense_products(one, other):
    [found] = compare_layers({"q": one}, {"q": other})
    first, second = dense(one), dense(other)
    assert found.norms == pytest.approx((float(first.norm()), float(second.norm())), rel=1e-5)
    assert found.change == pytest.approx(float((second - first).norm()), rel=1e-5)
    assert found.relative == pytest.approx(float((second - first).norm() / first.norm()), rel=1e-5)
    ranks = tuple(effective_rank(torch.linalg.svdvals(x)) for x in (first, second))
    assert found.effective_ranks == pytest.approx(ranks, rel=1e-5)


def test_the_same_product_in_other_factors_is_no_change():
    one = factors(1)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]
    other = Factors(mix @ one.a * 2, one.b @ mix.T / 2, one.scaling)
    [found] = compare_layers({"q": one}, {"q": other})
    assert found.relative < 1e-6
    assert found.effective_ranks[0] == pytest.approx(found.effective_ranks[1], rel=1e-5)
    assert max(found.input_angles + found.output_angles) < 1e-3


def test_a_change_far_below_the_norm_keeps_its_digits():
    one = factors(1)
    other = Factors(one.a.double(), one.b.double(), one.scaling)
    moved = other._replace(b=other.b * (1 + 1e-10))
    [found] = compare_layers({"q": other}, {"q": moved})
    assert found.relative == pytest.approx(1e-10, rel=1e-3)


@pytest.mark.parametrize("degrees", [1e-7, 0.01, 30.0, 60.0, 89.999, 90.0])
def test_the_angle_between_two_lines_is_exact_at_both_ends(degrees):
    angle = math.radians(degrees)
    [found] = principal_angles(line(1.0, 0.0), line(math.cos(angle), math.sin(angle))).tolist()
    assert found == pytest.approx(degrees, rel=1e-6)


def test_a_line_in_a_plane_has_no_angle_to_it_and_planes_have_two():
    plane = torch.eye(3, dtype=torch.float64)[:, :2]
    assert principal_angles(plane, line(1.0, 0.0, 0.0)).tolist() == pytest.approx([0.0])
    turned = torch.tensor([[1.0, 0], [0, math.cos(1.0)], [0, math.sin(1.0)]], dtype=torch.float64)
    wanted = [0.0, math.degrees(1.0)]
    assert principal_angles(plane, turned).tolist() == pytest.approx(wanted)


def test_input_and_output_angles_are_of_rows_and_of_columns():
    e = torch.eye(3)
    one = Factors(e[:1], e[:, :1], torch.tensor(1.0))
    other = Factors((e[:1] + e[1:2]) / 2**0.5, e[:, :1], torch.tensor(1.0))
    [found] = compare_layers({"q": one}, {"q": other})
    assert found.input_angles == pytest.approx((45.0,))
    assert found.output_angles == pytest.approx((0.0,))


@pytest.mark.parametrize(
    ("values", "expected"), [([1, 1, 1, 1], 4.0), ([5, 0, 0], 1.0), ([0, 0], 0.0), ([], 0.0)]
)
def test_effective_rank_counts_equal_directions(values, expected):
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_a_layer_that_one_adapter_has_not_is_zero_there():
    found = compare_layers({"q": factors(1)}, {"v": factors(2)})
    assert [x.layer for x in found] == ["q", "v"]
    gone, new = found
    assert (gone.norms[1], gone.relative, gone.input_angles) == (0.0, pytest.approx(1.0), ())
    assert (new.norms[0], new.relative, new.effective_ranks[0]) == (0.0, None, 0.0)
    assert new.change == pytest.approx(new.norms[1])


def test_a_fresh_b_of_zeros_has_no_directions():
    zero = factors(1)._replace(b=torch.zeros(7, 3))
    [found] = compare_layers({"q": zero}, {"q": factors(2)})
    assert found.norms[0] == 0.0
    assert found.output_angles == ()


def test_layers_of_different_base_models_are_refused():
    with pytest.raises(NotLowRank, match=r"layer 'q' is \[7, 5\] in one .* and \[7, 6\]"):
        compare_layers({"q": factors(1)}, {"q": factors(1, width=6)})


def test_other_tensors_are_compared_by_name():
    first = {"head": torch.tensor([3.0, 4.0]), "gone": torch.ones(1), "odd": torch.ones(2)}
    second = {"head": torch.tensor([3.0, 4.5]), "new": torch.ones(1), "odd": torch.ones(3)}
    found = {x.name: x for x in compare_tensors(first, second)}
    assert list(found) == ["gone", "head", "new", "odd"]
    assert found["head"].relative == pytest.approx(0.1)
    assert (found["gone"].relative, found["new"].relative) == (1.0, None)
    assert (found["odd"].change, found["odd"].relative) == (None, None)


def test_arguments_are_unchanged():
    one, other = factors(1), factors(2)
    before = [t.clone() for t in (*one, *other)]
    compare_layers({"q": one}, {"q": other})
    assert all(torch.equal(x, y) for x, y in zip(before, (*one, *other), strict=True))
