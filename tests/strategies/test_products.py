import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies.base import Update
from strategies.products import RunningProduct, at_rank, best, product_means
from strategies.tensors import BadUpdate

SIZES = st.integers(1, 12)


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    out_features=SIZES,
    in_features=SIZES,
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_a_running_product_is_the_dense_sum_whatever_the_ranks(
    out_features, in_features, ranks, seed
):
    total = RunningProduct(out_features, in_features)
    dense = torch.zeros(out_features, in_features, dtype=torch.float64)
    for index, rank in enumerate(ranks):
        b, a = drawn(seed + index, out_features, rank), drawn(seed - index - 1, rank, in_features)
        total.add(b, a, index + 0.5)
        dense += (index + 0.5) * b @ a
    total.scale(0.25)
    left, right = total.factors()
    assert_close(left @ right, dense / 4, rtol=0, atol=1e-10)
    assert total.rank == len(right) == min(sum(ranks), out_features, in_features)
    assert total.num_values <= 2 * out_features * in_features


@settings(deadline=None, max_examples=60)
@given(
    out_features=SIZES,
    in_features=SIZES,
    rank=st.integers(1, 8),
    kept=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_the_best_approximation_is_the_cut_of_the_dense_decomposition(
    out_features, in_features, rank, kept, seed
):
    b, a = drawn(seed, out_features, rank), drawn(seed + 1, rank, in_features)
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    found = best(b, a, kept)
    k = found.b.shape[1]
    expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert_close(found.b @ found.a[:k], expected, rtol=0, atol=1e-10)
    assert_close(found.kept, float(s[:kept].square().sum()))
    assert_close(found.total, float(s.square().sum()))
    left = float((b @ a - found.b @ found.a[:k]).square().sum())
    assert_close(found.total - found.kept, left, rtol=1e-9, atol=1e-9)  # the tail's energy


def test_only_what_is_not_zero_is_kept_where_no_rank_is_given():
    b, a = drawn(0, 5, 3), drawn(1, 3, 7)
    found = best(torch.cat([b, -b], dim=1), torch.cat([a, a]))
    assert found.b.shape == (5, 0)
    assert found.kept == found.total == 0.0


def test_memory_does_not_grow_with_the_number_of_terms():
    total = RunningProduct(6, 9)
    for seed in range(100):
        total.add(drawn(seed, 6, 2), drawn(seed, 2, 9))
    assert total.num_values == 6 * 9


def test_a_factor_that_was_not_sent_is_the_adapter_s_cut_to_the_update_s_rank(make_adapter):
    adapter = make_adapter(dtype=torch.float64)
    name = "encoder.query"
    a = drawn(3, 2, 12)
    update = Update("a", 1, "", {f"{name}.lora_A.weight": a}, 1)
    left, right = product_means([update], adapter, "examples")[0][name].factors()
    assert_close(left @ right, adapter[f"{name}.lora_B.weight"][:, :2] @ a)


@pytest.mark.parametrize(
    "shapes", [((5, 12), (7, 5)), ((2, 12), (7, 3)), ((2, 11), (7, 2)), ((0, 12), (7, 0))]
)
def test_factors_that_fit_no_rank_of_the_adapter_are_refused(make_adapter, shapes):
    name = "encoder.query"
    names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    sent = {n: torch.zeros(shape) for n, shape in zip(names, shapes, strict=True)}
    with pytest.raises(BadUpdate, match=r"'encoder.query' with lora_A and"):
        product_means([Update("a", 1, "", sent, 1)], make_adapter(), "examples")


def test_an_adapter_is_cut_once_for_all_clients_of_a_rank(make_adapter):
    adapter = make_adapter()
    assert at_rank(adapter, 2) is at_rank(dict(adapter), 2)
    assert at_rank(adapter, 2) is not at_rank(adapter, 1)
    other = {**adapter, "head.bias": torch.zeros(3)}
    assert torch.equal(at_rank(other, 2)["head.bias"], torch.zeros(3))


def test_a_cut_adapter_does_not_keep_the_whole_one_alive(make_adapter):
    adapter = make_adapter()
    cut, b = at_rank(adapter, 2), "encoder.query.lora_B.weight"
    whole = weakref.ref(adapter[b])
    del adapter
    gc.collect()
    assert whole() is None
    assert cut[b].shape == (7, 2)
    assert cut[b].untyped_storage().nbytes() == cut[b].nbytes
