import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies import tensors
from strategies.tensors import (
    BadUpdate,
    Factors,
    NotLowRank,
    factored_svd,
    lora_layers,
    lora_tensors,
    product_norm,
    refactor,
    refactored,
    same_products,
    weighted_mean,
)

ONE = torch.ones(())


def factors(seed, out_features, rank, in_features, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    b = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    return Factors(a.to(dtype), b.to(dtype), ONE)


def scalars(make_update, values, counts):
    return [
        make_update({"x": torch.tensor([v])}, c, n)
        for v, n, c in zip(values, counts, "abc", strict=True)
    ]


# weighted_mean


def test_the_uniform_mean_of_0_2_4_is_2(make_update):
    updates = scalars(make_update, [0.0, 2.0, 4.0], [1, 1, 98])
    assert weighted_mean(updates, {"x": torch.zeros(1)}, "uniform") == {"x": torch.tensor([2.0])}


def test_the_mean_counts_clients_by_their_examples(make_update):
    updates = scalars(make_update, [0.0, 2.0, 4.0], [2, 1, 1])
    assert weighted_mean(updates, {"x": torch.zeros(1)}, "examples") == {"x": torch.tensor([1.5])}


def test_equal_updates_give_exactly_themselves(make_update):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-9
    updates = [make_update({"x": value}, num_examples=n) for n in (3, 1, 7, 1013)]
    assert torch.equal(weighted_mean(updates, {"x": torch.ones(1000)}, "examples")["x"], value)


def test_the_mean_is_summed_in_more_digits_than_bfloat16_has(make_update):
    values = [torch.tensor([256.0], dtype=torch.bfloat16)] + [
        torch.tensor([1.0], dtype=torch.bfloat16)
    ] * 256
    updates = [make_update({"x": v}) for v in values]
    mean = weighted_mean(updates, {"x": values[0]}, "uniform")["x"]
    assert mean == torch.tensor([512 / 257], dtype=torch.bfloat16)


@pytest.mark.parametrize(("room_bytes", "most"), [(2**29, 16), (3 * 12, 3), (1, 2)])
def test_the_mean_holds_no_more_updates_than_it_has_room_for(
    make_update, monkeypatch, room_bytes, most
):
    monkeypatch.setattr(tensors, "_UPDATES_BYTES", room_bytes)
    earlier, held = [], []

    def stream():
        for _ in range(40):
            tensor = torch.ones(3)
            earlier.append(weakref.ref(tensor))
            held.append(sum(ref() is not None for ref in earlier))
            yield make_update({"x": tensor})
            del tensor

    weighted_mean(stream(), {"x": torch.zeros(3)}, "uniform")
    assert len(earlier) == 40
    assert max(held) == most  # where there is room for one only: it, and the next that is read


def test_how_many_updates_are_held_changes_no_bit_of_the_mean(make_update, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37, 50, generator=generator, dtype=torch.float64)
    updates = [make_update({"x": x}) for x in values]
    updates = [
        replace(u, weight=float(w.abs())) for u, w in zip(updates, values[:, 0], strict=True)
    ]
    means = []
    for most in (1, 2, 5, 16, 64):
        monkeypatch.setattr(tensors, "_UPDATES", most)
        means.append(weighted_mean(updates, {"x": values[0]}, "examples")["x"])
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_updates_of_no_weight_give_no_mean(make_update):
    like = {"x": torch.zeros(1)}
    assert weighted_mean([], like, "uniform") == {}
    assert weighted_mean(scalars(make_update, [1.0, 2.0, 3.0], [0] * 3), like, "examples") == {}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"y": torch.ones(2)}, "the update of 'b' has 'y', which the adapter has not"),
        ({"x": torch.ones(1)}, r"'x' of shape \[1\], the adapter has it of shape \[2\]"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(make_update, tensors, message):
    updates = [make_update({"x": torch.ones(2)}), make_update(tensors, "b")]
    with pytest.raises(BadUpdate, match=message):
        weighted_mean(updates, {"x": torch.zeros(2)}, "uniform")


@pytest.mark.parametrize("order", [1, -1])
def test_updates_that_train_different_tensors_are_refused(make_update, order):
    updates = [make_update({"x": torch.ones(2)}, "a"), make_update({}, "b")][::order]
    with pytest.raises(BadUpdate, match=r"do not train the same tensors \('x' is in one only\)"):
        weighted_mean(updates, {"x": torch.zeros(2)}, "uniform")


def test_a_negative_number_of_examples_is_refused(make_update):
    with pytest.raises(BadUpdate, match="counts -3 examples"):
        weighted_mean(
            [make_update({"x": torch.ones(1)}, "b", -3)], {"x": torch.ones(1)}, "examples"
        )


# lora_layers


def test_layers_and_tensors_are_inverse(make_adapter):
    adapter = make_adapter()
    again = lora_tensors(lora_layers(adapter))
    assert again.keys() == adapter.keys() - {"head.weight", "head.bias"}
    assert all(again[n] is adapter[n] for n in again)


def test_layers_are_sorted_whatever_the_order_of_tensors(make_adapter):
    adapter = dict(reversed(make_adapter().items()))
    assert list(lora_layers(adapter)) == ["encoder.query", "encoder.value"]


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.weight", "scaling"])
def test_an_incomplete_layer_is_refused_by_name(make_adapter, suffix):
    adapter = make_adapter()
    del adapter[f"encoder.value.{suffix}"]
    with pytest.raises(NotLowRank, match=rf"has no 'encoder\.value\.{suffix}'"):
        lora_layers(adapter)


def test_factors_of_unequal_rank_are_refused(make_adapter):
    adapter = make_adapter()
    adapter["encoder.value.lora_A.weight"] = torch.ones(5, 12)
    with pytest.raises(NotLowRank, match=r"shapes \[5, 12\], \[9, 4\], \[\]"):
        lora_layers(adapter)


def test_an_adapter_without_low_rank_layers_is_refused():
    with pytest.raises(NotLowRank, match="no low-rank layer"):
        lora_layers({"head.weight": torch.ones(2, 2)})


# factored_svd and refactor


def test_singular_values_agree_with_the_dense_ones():
    f = factors(0, 9, 4, 12)
    u, s, vh = factored_svd(f.b, f.a)
    assert_close(s, torch.linalg.svdvals(f.b @ f.a)[:4])
    assert_close((u * s) @ vh, f.b @ f.a)


def test_a_product_with_known_singular_values_is_split_by_hand():
    # b @ a = [[0, 6], [0, 0], [4, 0]]: singular values 6 and 4
    b = torch.tensor([[0.0, -3.0], [0.0, 0.0], [2.0, 0.0]])
    a = torch.tensor([[2.0, 0.0], [0.0, -2.0]])
    new = refactor(Factors(a, b, ONE))
    assert_close(new.a, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert_close(new.b, torch.tensor([[6.0, 0.0], [0.0, 0.0], [0.0, 4.0]]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999), st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.integers(0, 6)
)
def test_refactor_keeps_product_shapes_and_row_space_at_any_rank(seed, out, rank, width, lost):
    f = factors(seed, out, rank, width)
    f.b[:, : min(lost, rank)] = 0.0  # a B of deficient rank, down to zero
    new = refactor(f)
    assert (new.a.shape, new.b.shape) == (f.a.shape, f.b.shape)
    assert_close(new.b @ new.a, f.b @ f.a, rtol=0, atol=1e-10)
    gram = new.a @ new.a.T
    rows = min(rank, width)
    assert_close(gram[:rows, :rows], torch.eye(rows, dtype=torch.float64), rtol=0, atol=1e-10)
    q, _ = torch.linalg.qr(f.a.T)
    assert torch.linalg.svdvals(new.a[:rows] @ q).min() >= 1 - 1e-10


def test_the_new_b_has_orthogonal_columns_of_descending_norm():
    new = refactor(factors(0, 9, 4, 12))
    gram = new.b.T @ new.b
    norms = gram.diagonal()
    assert_close(gram, torch.diag(norms), rtol=0, atol=1e-12)
    assert torch.equal(norms, norms.sort(descending=True).values)


def test_the_largest_entry_of_every_new_row_is_positive():
    new = refactor(factors(0, 9, 4, 12))
    assert (new.a.gather(1, new.a.abs().argmax(1, keepdim=True)) > 0).all()


def test_float32_factors_keep_their_product_to_float32_digits():
    f = factors(0, 64, 8, 96, torch.float32)
    new = refactor(f)
    product = f.b.double() @ f.a.double()
    error = (new.b.double() @ new.a.double() - product).abs().max() / product.abs().max()
    assert new.a.dtype == torch.float32
    assert error <= 1e-5 / 10


def test_refactoring_twice_is_refactoring_once():
    once = refactor(factors(0, 9, 4, 12))
    assert_close(refactor(once), once, rtol=0, atol=1e-10)


def test_what_rounding_leaves_of_zero_is_zero():
    f = factors(0, 9, 4, 12)
    f.b[:, 1:] = f.b[:, :1]  # four equal columns: rank 1
    new = refactor(f)
    assert new.b[:, 0].norm() > 1.0
    assert not new.b[:, 1:].any()


@pytest.mark.parametrize("smallest", [1e-6, 1e-8, 1e-12])
def test_a_nearly_deficient_float32_b_does_not_lose_the_row_space(smallest):
    f = factors(0, 40, 4, 60, torch.float32)
    u, _, vh = torch.linalg.svd(f.b, full_matrices=False)
    b = (u * torch.tensor([1.0, 0.5, 0.25, smallest])) @ vh
    new = refactor(Factors(f.a, b, ONE))
    q, _ = torch.linalg.qr(f.a.double().T)
    assert torch.linalg.svdvals(new.a.double() @ q).min() >= 1 - 1e-6


def test_rows_have_the_norm_that_is_asked_for_and_the_product_stays():
    f = factors(0, 9, 4, 12)
    new = refactor(f, row_norm=0.5)
    assert_close(new.a.norm(dim=1), torch.full((4,), 0.5, dtype=torch.float64))
    assert_close(new.b @ new.a, f.b @ f.a)


def test_the_norm_of_a_product_is_that_of_the_dense_one():
    f = factors(3, 9, 4, 12)
    assert product_norm(f.b, f.a) == pytest.approx(float((f.b @ f.a).norm()), rel=1e-12)


def test_a_refactored_adapter_has_the_same_products_and_a_moved_one_has_not():
    generator = torch.Generator().manual_seed(1)
    one = {
        "q.lora_A.weight": torch.randn(2, 5, generator=generator),
        "q.lora_B.weight": torch.randn(6, 2, generator=generator),
        "q.scaling": torch.tensor(0.5),
    }

    assert same_products(one, refactored(one, 3.0))
    doubled = {**one, "q.scaling": torch.tensor(1.0), "q.lora_B.weight": one["q.lora_B.weight"] / 2}
    assert same_products(one, doubled)
    assert not same_products(one, {**one, "q.lora_A.weight": one["q.lora_A.weight"].flip(0)})
    other = {name.replace("q.", "k."): tensor for name, tensor in one.items()}
    assert not same_products(one, other)


def test_a_layer_with_a_diagonal_between_its_factors_is_not_low_rank():
    layer = {
        "q.lora_A.weight": torch.ones(2, 5),
        "q.lora_B.weight": torch.ones(6, 2),
        "q.scaling": torch.tensor(1.0),
        "q.lora_diag": torch.ones(2),
    }

    with pytest.raises(NotLowRank, match="'q' has a diagonal between its factors"):
        lora_layers(layer)
