import pytest
import torch
from torch.testing import assert_close

from strategies.sums import bundles, plus, plus_each


def terms(count, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
    return list(drawn.to(dtype))


def dense(found, weights):
    return sum(weight * term.double() for term, weight in zip(found, weights, strict=True))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2**18 + 7,), (700, 801)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sum_is_that_of_the_weighted_terms_in_float64(shape, dtype):
    found, weights = terms(3, shape, dtype), [2.0, 0.25, 7.0]
    total = plus(None, found, weights)
    assert total.dtype == torch.float64
    assert_close(total, dense(found, weights), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("columns", [6, 2**18])
def test_terms_may_lie_in_memory_as_they_like(columns):
    one, other = (term.T for term in terms(2, (columns, 3)))
    assert not one.is_contiguous()
    total = plus(None, [one, other], [1.0, 3.0])
    assert_close(total, dense([one, other], [1.0, 3.0]), rtol=1e-14, atol=1e-14)
    assert total.is_contiguous()


@pytest.mark.parametrize("size", [1000, 2**18 + 1000])
def test_terms_of_several_calls_give_the_bits_of_one_call(size):
    found, weights = terms(5, (size,)), [0.1, 3.7, 1 / 3, 2.0, 1e-3]
    total = plus(None, found[:2], weights[:2])
    assert plus(total, found[2:], weights[2:]) is total
    assert torch.equal(total, plus(None, found, weights))


@pytest.mark.parametrize("size", [1000, 2**18 + 1000])
def test_terms_are_not_changed(size):
    found = terms(3, (size,), torch.float64)
    copies = [term.clone() for term in found]
    plus(None, found, [2.0, 3.0, 4.0])
    assert all(torch.equal(one, other) for one, other in zip(found, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_are_made_together_have_the_bits_of_each_alone(dtype):
    shapes, weights = [(), (0,), (3, 5), (700,)], [0.1, 3.7, 1 / 3, 2.0]
    apart = [terms(4, shape, dtype) for shape in shapes]
    apart[2] = [term.T for term in apart[2]]
    together = list(zip(*apart, strict=True))
    wanted = [plus(None, found, weights) for found in apart]

    first = plus_each(None, together[:2], weights[:2])
    for made in (plus_each(None, together, weights), plus_each(first, together[2:], weights[2:])):
        assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))
        assert all(one.is_contiguous() for one in made)
    assert all(torch.equal(one, other) for one, other in zip(first, wanted, strict=True))
    assert plus_each(first, [], [])[3] is first[3]


def test_bundles_have_every_name_once_in_order_and_large_ones_alone():
    sizes = {f"{n:02}": size for n, size in enumerate([5, 2**17, 7, 2**16, 2**16, 1, 2**20, 0])}
    found = list(bundles(sizes))
    assert [name for bundle in found for name in bundle] == sorted(sizes)
    assert all(len(b) == 1 or sum(sizes[n] for n in b) <= 2**17 for b in found)
    assert ["06"] in found
    assert list(bundles({})) == []
