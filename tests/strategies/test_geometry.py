import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies.base import Update
from strategies.geometry import closeness, distances, factor_for, gram, scaled
from strategies.tensors import BadUpdate

A, B, SCALING = "q.lora_A.weight", "q.lora_B.weight", "q.scaling"
CORE = "q.lora_core.weight"


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed, out, width, rank, scaling, trained, ranks=()):
    """An adapter with a head, and three updates of it that train the tensors in ``trained``."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {
        A: random(generator, rank, width),
        B: random(generator, out, rank),
        SCALING: torch.tensor(scaling, dtype=torch.float64),
        "head.weight": random(generator, 2, 3),
    }
    updates = []
    for client, own in zip("abc", ranks or [rank] * 3, strict=True):
        tensors = {A: random(generator, own, width), B: random(generator, out, own)}
        tensors |= {"head.weight": random(generator, 2, 3)}
        updates.append(Update(client, 1, "733e", {n: tensors[n] for n in sorted(trained)}, 1))
    return adapter, updates


def dense(adapter, tensors):
    """The whole model as one vector: product and head."""
    now = {**adapter, **tensors}
    product = now[SCALING] * now[B] @ now[A]
    return torch.cat([product.flatten(), now["head.weight"].flatten()])


def change(adapter, update):
    return dense(adapter, update.tensors) - dense(adapter, {})


sizes = st.integers(1, 9)
trainable = st.sampled_from(
    [{A, B}, {B}, {A}, {A, B, "head.weight"}, {B, "head.weight"}, {"head.weight"}]
)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), sizes, sizes, st.integers(1, 4), st.floats(0.1, 20), trainable)
def test_inner_products_are_those_of_the_dense_changes(seed, out, width, rank, scaling, trained):
    adapter, updates = problem(seed, out, width, rank, scaling, trained)
    rows = torch.stack([change(adapter, update) for update in updates])
    expected = rows @ rows.T
    assert_close(gram(adapter, updates), expected, rtol=0, atol=1e-10 * float(1 + expected.max()))


def test_clients_may_have_ranks_of_their_own():
    adapter, updates = problem(0, 6, 5, 2, 2.0, {A, B}, ranks=(1, 2, 4))
    rows = torch.stack([change(adapter, update) for update in updates])
    assert_close(gram(adapter, updates), rows @ rows.T)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(4, 9), st.integers(4, 9), st.integers(1, 4))
def test_inner_products_of_cores_are_those_of_the_dense_changes(seed, out, width, rank):
    """Between factors that are not orthonormal, and with a head."""
    adapter, updates = cores(seed, out, width, rank)
    rows = torch.stack([core_change(adapter, update) for update in updates])
    expected = rows @ rows.T
    assert_close(gram(adapter, updates), expected, rtol=0, atol=1e-10 * float(1 + expected.max()))
    norm = 0.3 * float(rows[0].norm())
    shorter = scaled(adapter, updates[0], factor_for(adapter, updates[0], norm))
    assert float(core_change(adapter, shorter).norm()) == pytest.approx(norm, rel=1e-9)


def test_between_orthonormal_factors_inner_products_are_those_of_the_cores():
    adapter, updates = cores(0, 6, 5, 3)
    adapter[B] = torch.linalg.qr(adapter[B]).Q
    adapter[A] = torch.linalg.qr(adapter[A].T).Q.T
    rows = torch.stack([(u.tensors[CORE] - adapter[CORE]).flatten() for u in updates])
    assert_close(gram(adapter, updates, head=False), 4 * rows @ rows.T)  # scaling 2, squared


def test_a_factor_that_moved_around_a_core_is_refused():
    adapter, [update, *_] = cores(0, 6, 5, 3)
    odd = Update("a", 1, "733e", {**update.tensors, A: adapter[A] + 1}, 1)
    with pytest.raises(BadUpdate, match="which is frozen around a core"):
        gram(adapter, [odd])


def cores(seed, out, width, rank):
    """An adapter with a core and a head, and three updates of these."""
    adapter, updates = problem(seed, out, width, rank, 2.0, {"head.weight"})
    generator = torch.Generator().manual_seed(seed + 100)
    adapter[CORE] = random(generator, rank, rank)
    return adapter, [
        Update(u.client, 1, "733e", {**u.tensors, CORE: random(generator, rank, rank)}, 1)
        for u in updates
    ]


def core_change(adapter, update):
    """The change of the whole model as one vector."""
    core = update.tensors[CORE] - adapter[CORE]
    product = adapter[SCALING] * adapter[B] @ core @ adapter[A]
    head = update.tensors["head.weight"] - adapter["head.weight"]
    return torch.cat([product.flatten(), head.flatten()])


def test_a_bias_that_trains_whole_counts_where_the_head_is_left_out():
    adapter, updates = problem(0, 6, 5, 2, 2.0, {B, "head.weight"})
    shift, far = "q.shift.bias", torch.full((6,), 100.0, dtype=torch.float64)
    hostile = replace(updates[0], tensors={**updates[0].tensors, shift: far})
    adapter = {**adapter, shift: torch.zeros_like(far)}

    assert gram(adapter, [hostile], head=False) > far.square().sum()
    back = scaled(adapter, hostile, factor_for(adapter, hostile, 1.0, head=False))
    assert_close(gram(adapter, [back], head=False), torch.ones(1, 1, dtype=torch.float64))


def test_the_head_can_be_left_out():
    adapter, updates = problem(0, 6, 5, 2, 2.0, {B, "head.weight"})
    bare = [Update(u.client, 1, "733e", {B: u.tensors[B]}, 1) for u in updates]
    assert_close(gram(adapter, updates, head=False), gram(adapter, bare))


def test_inner_products_do_not_depend_on_the_gauge_of_a_client():
    adapter, updates = problem(0, 6, 5, 2, 2.0, {A, B})
    generator = torch.Generator().manual_seed(1)
    turned = []
    for update in updates:
        g = random(generator, 2, 2)
        tensors = {A: g @ update.tensors[A], B: update.tensors[B] @ torch.linalg.inv(g)}
        turned.append(Update(update.client, 1, "733e", tensors, 1))
    assert_close(gram(adapter, turned), gram(adapter, updates))


def test_distances_are_exact_where_the_model_is_large_and_the_changes_are_small():
    """Weights of norm 4e3 in float32, which flwr's distances of weights round to nothing."""
    adapter = {
        A: torch.eye(4),
        B: torch.full((1000, 4), 64.0),
        SCALING: torch.tensor(1.0),
    }
    steps = [0.0, 2.0**-10, 3 * 2.0**-10]
    updates = [Update("a", 1, "733e", {B: adapter[B] + step}, 1) for step in steps]
    squared = distances(gram(adapter, updates))
    assert_close(squared[0], torch.tensor([0.0, 1.0, 9.0]).double() * 4000 * 2.0**-20)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), trainable, st.floats(0.01, 0.99))
def test_a_change_is_shortened_to_the_norm_that_is_asked_for(seed, trained, share):
    adapter, updates = problem(seed, 6, 5, 2, 2.0, trained)
    norm = share * float(change(adapter, updates[0]).norm())
    factor = factor_for(adapter, updates[0], norm)
    after = float(change(adapter, scaled(adapter, updates[0], factor)).norm())
    assert after == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("trained", [{B}, {A, B}], ids=["one factor", "both"])
def test_a_change_can_be_lengthened(trained):
    adapter, updates = problem(0, 6, 5, 2, 2.0, trained)
    norm = 7 * float(change(adapter, updates[0]).norm())
    longer = scaled(adapter, updates[0], factor_for(adapter, updates[0], norm))
    assert float(change(adapter, longer).norm()) == pytest.approx(norm, rel=1e-9)


def test_no_change_stays_none():
    adapter, _ = problem(0, 6, 5, 2, 2.0, {B})
    update = Update("a", 1, "733e", {B: adapter[B]}, 1)
    assert factor_for(adapter, update, 3.0) == 1.0


def test_what_overflows_does_not_hide_the_others():
    adapter, updates = problem(0, 6, 5, 2, 2.0, {A, B})
    huge = Update("x", 1, "733e", {A: adapter[A] * 1e200, B: adapter[B] * 1e200}, 1)
    inner = gram(adapter, [*updates, huge])
    assert_close(inner[:3, :3], gram(adapter, updates))
    assert bool(torch.isinf(distances(inner)[:3, 3]).all())


def test_scores_are_sums_over_the_nearest_others():
    """On a line at 0, 1, 3, 7 with one hostile: each is scored by its nearest other."""
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert closeness(points @ points.T, hostile=1) == [0, 1, 2, 3]
    points = torch.tensor([[7.0], [3.0], [1.0], [0.5]])
    assert closeness(points @ points.T, hostile=1) == [2, 3, 1, 0]


def test_a_distance_is_never_negative_or_no_number():
    inner = torch.tensor([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, math.inf]])
    assert distances(inner).tolist() == [[0.0, math.inf], [math.inf, math.inf]]
