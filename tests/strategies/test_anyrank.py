"""FlexLoRA, FLoRA, FedEx-LoRA and HetLoRA: each paper's own property, against dense arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies.base import ClientSpec, ServerState, Setting, Update, beneath
from strategies.fedex_lora import FedExLoRA
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.hetlora import HetLoRA

A, B, SCALING = "q.lora_A.weight", "q.lora_B.weight", "q.scaling"


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_layer(seed, out_features, in_features, rank, scaling=1.0):
    return {
        A: drawn(seed, rank, in_features),
        B: drawn(seed + 1, out_features, rank),
        SCALING: torch.tensor(scaling, dtype=torch.float64),
    }


def delta(tensors):
    return tensors[SCALING] * tensors[B] @ tensors[A] if A in tensors else 0.0


def whole(state):
    return delta(state.adapter) + delta(beneath(state.auxiliary))


PROBLEMS = {
    "out_features": st.integers(1, 9),
    "in_features": st.integers(1, 9),
    "ranks": st.lists(st.integers(1, 4), min_size=1, max_size=5),
    "counts": st.lists(st.integers(1, 50), min_size=5, max_size=5),
    "scaling": st.floats(0.1, 8.0),
    "seed": st.integers(0, 2**16),
}


def problem(out_features, in_features, ranks, counts, scaling, seed):
    """Return an adapter of rank 4 and updates of clients of other ranks."""
    updates = []
    for index, (rank, count) in enumerate(zip(ranks, counts, strict=False)):
        sent = one_layer(seed + 2 * index + 2, out_features, in_features, rank)
        updates.append(Update(f"c{index}", 1, "", {A: sent[A], B: sent[B]}, count))
    return one_layer(seed, out_features, in_features, 4, scaling), updates


def mean_delta(updates, scaling):
    total = sum(u.num_examples for u in updates)
    return sum(u.num_examples / total * scaling * u.tensors[B] @ u.tensors[A] for u in updates)


@settings(deadline=None, max_examples=50)
@given(**PROBLEMS)
def test_flexlora_is_the_best_approximation_of_the_mean_and_so_is_each_lower_rank(**kwargs):
    adapter, updates = problem(**kwargs)
    state = FlexLoRA().aggregate(FlexLoRA().init(adapter), updates)
    dense = mean_delta(updates, adapter[SCALING])
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    for rank in (1, 2, 4):
        sent = FlexLoRA().broadcast(state, ClientSpec("x", rank=rank)).tensors
        cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert sent[A].shape[0] == rank
        error = float(torch.linalg.matrix_norm(dense - delta(sent)))
        assert_close(delta(sent), cut, rtol=0, atol=1e-10 * max(1.0, float(s[0])))
        assert error**2 == pytest.approx(float(s[rank:].square().sum()), abs=1e-9)
    share = float(s[:4].square().sum() / s.square().sum())
    assert state.metrics["captured_energy"] == pytest.approx(share)
    assert state.metrics["captured_energy/q"] == pytest.approx(share)
    told = {
        n.removeprefix("captured_energy_at_"): x for n, x in state.metrics.items() if "_at_" in n
    }
    by_layer = {n.removesuffix("/q"): told.pop(n) for n in list(told) if n.endswith("/q")}
    assert by_layer == pytest.approx(told)  # there is one layer
    lower = {str(rank) for rank in kwargs["ranks"] if rank < 4}
    assert told.keys() == lower
    for rank, found in told.items():
        at = float(s[: int(rank)].square().sum() / s.square().sum())
        assert found == pytest.approx(at)


@settings(deadline=None, max_examples=50)
@given(**PROBLEMS)
def test_flora_adds_the_mean_of_the_products_whatever_the_ranks_and_rounds(**kwargs):
    adapter, updates = problem(**kwargs)
    state = FLoRA().init(adapter)
    expected = delta(adapter)
    assert_close(whole(state), expected, rtol=0, atol=1e-10)
    for _ in range(3):
        state = FLoRA().aggregate(state, updates)
        expected = expected + mean_delta(updates, adapter[SCALING])
        assert_close(whole(state), expected, rtol=0, atol=1e-10 * max(1.0, float(expected.norm())))
        assert not state.adapter[B].any()
        rank = len(beneath(state.auxiliary)[A])
        assert rank <= min(kwargs["out_features"], kwargs["in_features"])


@settings(deadline=None, max_examples=50)
@given(**PROBLEMS)
def test_fedex_lora_s_factors_and_residual_are_the_mean_of_the_products(**kwargs):
    kwargs["ranks"] = [4] * len(kwargs["ranks"])
    adapter, updates = problem(**kwargs)
    state = FedExLoRA().aggregate(FedExLoRA().init(adapter), updates)
    expected = mean_delta(updates, adapter[SCALING])
    assert_close(whole(state), expected, rtol=0, atol=1e-10 * max(1.0, float(expected.norm())))
    total = sum(u.num_examples for u in updates)
    mean = sum(u.num_examples / total * u.tensors[A] for u in updates)
    assert_close(state.adapter[A], mean, rtol=0, atol=1e-12)
    lost = float((delta(state.adapter) - expected).norm() / expected.norm())
    assert state.metrics["averaging_error"] == pytest.approx(lost, abs=1e-8)


def test_fedex_lora_s_residual_has_the_rank_of_all_clients_but_one(make_update):
    adapter = one_layer(0, 20, 20, 2)  # square, where a transpose would not show by its shape
    updates = [
        make_update({n: t for n, t in one_layer(s, 20, 20, 2).items() if n != SCALING}, f"c{s}")
        for s in (10, 20, 30)
    ]
    state = FedExLoRA().aggregate(FedExLoRA().init(adapter), updates)
    assert len(beneath(state.auxiliary)[A]) == (3 - 1) * 2
    assert_close(whole(state), mean_delta(updates, 1.0), rtol=0, atol=1e-10)


def test_clients_of_fedex_lora_that_agree_leave_nothing_beneath(make_update):
    adapter = one_layer(0, 7, 9, 2)
    same = {n: t for n, t in one_layer(5, 7, 9, 2).items() if n != SCALING}
    updates = [make_update(same, client, count) for client, count in (("a", 1), ("b", 7))]
    state = FedExLoRA().aggregate(FedExLoRA().init(adapter), updates)
    assert beneath(state.auxiliary) == {}
    assert_close(delta(state.adapter), same[B] @ same[A])


def test_fedex_lora_s_rank_keeps_the_best_of_the_residual_and_says_how_much(make_update):
    adapter = {**one_layer(0, 2, 2, 2), A: torch.eye(2).double()}
    zero = torch.zeros(2, 2, dtype=torch.float64)
    # the products' mean is diag(5, 2), that of the factors diag(1, 1) and diag(5, 2) halved twice
    updates = [
        make_update(
            {A: 2 * torch.eye(2).double(), B: torch.diag(torch.tensor([5.0, 2.0])).double()}
        ),
        make_update({A: zero, B: zero}, "b"),
    ]
    strategy = FedExLoRA(rank=1)
    state = strategy.aggregate(strategy.init(adapter), updates)
    # residual: diag(5, 2) - diag(2.5, 1) @ eye = diag(2.5, 1), of which 2.5 is kept
    expected = torch.diag(torch.tensor([5.0, 1.0], dtype=torch.float64))
    assert_close(whole(state), expected)
    assert state.metrics["captured_energy"] == pytest.approx(6.25 / 7.25)
    assert "exact" not in strategy.capabilities


def test_flora_s_max_rank_keeps_the_best_beneath_and_says_how_much(make_update):
    adapter = {**one_layer(0, 3, 3, 2), B: torch.zeros(3, 2, dtype=torch.float64)}
    a = torch.eye(3, dtype=torch.float64)[:2]
    b = torch.tensor([[3.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    strategy = FLoRA(max_rank=1)
    state = strategy.aggregate(strategy.init(adapter), [make_update({A: a, B: b})])
    assert_close(whole(state), torch.diag(torch.tensor([3.0, 0, 0], dtype=torch.float64)))
    assert state.metrics["captured_energy/q"] == pytest.approx(0.9)
    assert "exact" not in strategy.capabilities


def test_flora_draws_another_a_in_every_round_and_the_same_one_again(make_update):
    adapter = one_layer(0, 6, 16, 2)
    updates = [make_update({n: adapter[n] for n in (A, B)})]

    def rounds(seed):
        state = FLoRA().init(adapter, Setting(seed=seed))
        for _ in range(3):
            state = FLoRA().aggregate(state, updates)
            yield state.adapter[A]

    first, again, other = (list(rounds(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in (*first, *other)}) == 6
    assert all(a.abs().max() <= 16**-0.5 for a in first)


def test_a_flora_client_of_a_lower_rank_starts_from_the_same_model():
    state = FLoRA().init(one_layer(0, 6, 8, 4))  # with a product, which goes beneath
    sent = FLoRA().broadcast(state, ClientSpec("small", rank=1)).tensors
    assert_close(delta(sent) + delta(beneath(state.auxiliary)), whole(state))


def test_flexlora_keeps_ranks_that_the_mean_does_not_need_trainable(make_update):
    adapter = one_layer(0, 6, 8, 4)
    small = {n: t for n, t in one_layer(3, 6, 8, 1).items() if n != SCALING}
    state = FlexLoRA().aggregate(FlexLoRA().init(adapter), [make_update(small)])
    assert_close(delta(state.adapter), small[B] @ small[A])
    assert_close(state.adapter[A] @ state.adapter[A].T, torch.eye(4, dtype=torch.float64))
    assert not state.adapter[B][:, 1:].any()


def test_flexlora_leaves_a_as_drawn_where_there_is_no_product_yet():
    adapter = {**one_layer(0, 6, 8, 4), B: torch.zeros(6, 4, dtype=torch.float64)}
    assert torch.equal(FlexLoRA().init(adapter).adapter[A], adapter[A])


PADDED = {
    A: torch.zeros(2, 1, dtype=torch.float64),
    B: torch.zeros(1, 2, dtype=torch.float64),
    SCALING: torch.tensor(1.0),
}


@pytest.fixture
def two_ranks(make_update):
    """A client of rank 1 with product 6 (3 * 2), and one of rank 2 with 2 * 1 + 0 * 4 = 2."""
    small = {A: torch.tensor([[3.0]]).double(), B: torch.tensor([[2.0]]).double()}
    large = {A: torch.tensor([[2.0], [4.0]]).double(), B: torch.tensor([[1.0, 0.0]]).double()}
    return [make_update(small, "a", 1), make_update(large, "b", 3)]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [(3 * 6 + 2 * 2) / 8, 4 * 2 / 8]),
        ({"masked": True}, [(3 * 6 + 2 * 2) / 8, 4.0]),
        ({"weighting": "uniform"}, [2.5, 2.0]),
        ({"weighting": "examples"}, [(3 + 2 * 3) / 4, 4 * 3 / 4]),
        ({"weighting": "examples", "masked": True}, [(3 + 2 * 3) / 4, 4.0]),
    ],
    ids=str,
)
def test_hetlora_averages_padded_factors_by_norm_or_count(two_ranks, options, rows):
    state = HetLoRA(**options).aggregate(ServerState(PADDED), two_ranks)
    assert state.adapter[A].flatten().tolist() == pytest.approx(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighting", ["norm", "examples"])
@settings(deadline=None, max_examples=20)
@given(**PROBLEMS)
def test_hetlora_tells_what_the_mean_of_the_factors_loses_of_that_of_the_products(
    masked, weighting, **kwargs
):
    adapter, updates = problem(**kwargs)
    strategy = HetLoRA(weighting=weighting, masked=masked)
    state = strategy.aggregate(ServerState(adapter), updates)
    products = [u.tensors[B] @ u.tensors[A] for u in updates]
    weights = [
        float(p.norm()) if weighting == "norm" else u.num_examples
        for p, u in zip(products, updates, strict=True)
    ]
    mean = sum(w * p for w, p in zip(weights, products, strict=True)) / sum(weights)
    made = state.adapter[B] @ state.adapter[A]
    expected = float((mean - made).norm() / mean.norm())
    assert state.metrics["averaging_error"] == pytest.approx(expected, abs=1e-8)
    assert state.metrics["averaging_error/q"] == state.metrics["averaging_error"]
    for rank in {r for r in kwargs["ranks"] if r < 4}:
        left_out = made - state.adapter[B][:, :rank] @ state.adapter[A][:rank]
        kept = 1 - float(left_out.norm() ** 2 / made.norm() ** 2)
        assert state.metrics[f"captured_energy_at_{rank}"] == pytest.approx(kept)
        assert state.metrics[f"captured_energy_at_{rank}/q"] == pytest.approx(kept)


def test_masked_hetlora_keeps_a_rank_that_nobody_holds(make_update):
    adapter = one_layer(0, 5, 6, 3)
    small = {A: drawn(7, 1, 6), B: drawn(8, 5, 1)}
    padded, masked = (
        HetLoRA(masked=m).aggregate(ServerState(adapter), [make_update(small)]).adapter
        for m in (False, True)
    )
    assert not padded[A][1:].any()
    assert torch.equal(masked[A][1:], adapter[A][1:])
    assert torch.equal(masked[B][:, 1:], adapter[B][:, 1:])
    assert_close(masked[A][:1], small[A])


def test_hetlora_with_equal_ranks_and_norms_is_the_mean_of_the_factors(make_update):
    adapter = one_layer(0, 4, 6, 2)
    one = {n: adapter[n] for n in (A, B)}
    other = {A: -adapter[A], B: adapter[B]}
    state = HetLoRA().aggregate(
        ServerState(adapter), [make_update(one), make_update(other, "b", 9)]
    )
    assert_close(state.adapter[A], torch.zeros_like(adapter[A]))
    assert_close(state.adapter[B], adapter[B])


def test_hetlora_leaves_a_layer_without_any_product_as_it_is(make_update):
    adapter = one_layer(0, 4, 6, 2)
    still = {A: drawn(9, 2, 6), B: torch.zeros(4, 2, dtype=torch.float64)}
    state = HetLoRA().aggregate(ServerState(adapter), [make_update(still)])
    assert torch.equal(state.adapter[A], adapter[A])


@pytest.mark.parametrize(
    "strategy", [FlexLoRA(), FLoRA(), FedExLoRA()], ids=lambda s: type(s).__name__
)
def test_magnitudes_and_heads_are_averaged_and_each_layer_s_scaling_counts(strategy, make_update):
    """DoRA's magnitude is a tensor like a head's; rsLoRA and alpha patterns are scalings."""
    two = one_layer(0, 6, 6, 3, scaling=0.5)
    adapter = {**two, **{n.replace("q.", "v."): t for n, t in one_layer(4, 5, 9, 2, 16.0).items()}}
    adapter |= {"q.lora_magnitude_vector": torch.ones(6), "head.bias": torch.zeros(2)}
    sent = [{n: t + i for n, t in adapter.items() if not n.endswith("scaling")} for i in (1.0, 3.0)]
    state = strategy.init(adapter)
    before = ServerState({**state.adapter}, state.auxiliary)
    updates = [make_update(tensors, str(i)) for i, tensors in enumerate(sent)]
    after = strategy.aggregate(before, updates)
    assert torch.equal(after.adapter["q.lora_magnitude_vector"], torch.full((6,), 3.0))
    assert torch.equal(after.adapter["head.bias"], torch.full((2,), 2.0))
    for layer, scaling in (("q", 0.5), ("v", 16.0)):
        assert after.adapter[f"{layer}.scaling"] == scaling
        a, b, s = (f"{layer}.{part}" for part in ("lora_A.weight", "lora_B.weight", "scaling"))
        lying, old = beneath(after.auxiliary), beneath(before.auxiliary)
        got, was = (t[s] * t[b] @ t[a] if a in t else torch.zeros(()) for t in (lying, old))
        mean = sum(scaling * t[b] @ t[a] for t in sent) / 2
        rank = len(adapter[a])
        own = after.adapter[s] * after.adapter[b] @ after.adapter[a]
        if isinstance(strategy, FlexLoRA):
            u, values, vh = torch.linalg.svd(mean, full_matrices=False)
            mean = (u[:, :rank] * values[:rank]) @ vh[:rank]
        assert_close(own + got - was, mean, rtol=1e-10, atol=1e-10)
