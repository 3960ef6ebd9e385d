"""What averaging factors loses is measured without the products that it is about."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw
from torch.testing import assert_close

from strategies import drift
from strategies.base import Update
from strategies.drift import AveragingError
from strategies.fedavg import FedAvg
from strategies.tensors import weighted_mean

A, B, S = "q.lora_A.weight", "q.lora_B.weight", "q.scaling"


def adapter(a, b, scaling=1.0):
    to = {"dtype": torch.float64}
    return {A: torch.tensor(a, **to), B: torch.tensor(b, **to), S: torch.tensor(scaling)}


def trained(tensors, client="a", weight=1):
    return Update(client, 1, "", {n: tensors[n] for n in (A, B)}, weight)


def measured(start, updates, weighting="examples"):
    error = AveragingError(start, weighting)
    mean = weighted_mean(error.watching(updates), start, weighting)
    return error.metrics({**start, **mean})


def test_two_clients_that_went_opposite_ways_lose_all_of_their_mean_product():
    """(1)(1) and (-1)(-1): the mean product is 1, the product of the means 0."""
    one, other = adapter([[1.0]], [[1.0]]), adapter([[-1.0]], [[-1.0]])
    found = measured(adapter([[0.5]], [[0.0]]), [trained(one), trained(other, "b")])
    assert found == {"averaging_error": 1.0, "averaging_error/q": 1.0}


def test_weights_count_as_in_the_mean():
    """Weights 3 and 1 of products 4 and 0: the mean is 3, and that of the factors 3/2 * 3/2."""
    two, none = adapter([[2.0]], [[2.0]]), adapter([[0.0]], [[0.0]])
    found = measured(none, [trained(two, weight=3), trained(none, "b")])
    assert found["averaging_error"] == pytest.approx((3 - 2.25) / 3)


def test_clients_that_agree_lose_nothing():
    one = adapter([[2.0, 1.0]], [[2.0]])
    found = measured(adapter([[1.0, 1.0]], [[0.0]]), [trained(one), trained(one, "b")])
    assert found["averaging_error"] < 1e-15


def test_factors_that_are_not_the_weighted_means_are_measured_where_it_is_loose():
    """Products 1 and 9 of weights 3 and 1, mean 3; whatever factors follow are held against it."""
    start, made = adapter([[0.5]], [[2.0]]), adapter([[1.0]], [[1.5]], scaling=-2.0)
    error = AveragingError({**start, S: torch.tensor(-2.0)}, "examples", loose=True)
    list(error.watching([trained(adapter([[1.0]], [[1.0]]), weight=3)]))
    error.add("q", 1.0, *(torch.full((1, 1), 3.0, dtype=torch.float64) for _ in "ba"))
    assert error.metrics(made)["averaging_error"] == pytest.approx((3 - 1.5) / 3)


def test_no_update_and_a_round_that_trains_one_factor_are_not_measured():
    start = adapter([[1.0]], [[0.0]])
    only_b = Update("a", 1, "", {B: torch.ones(1, 1, dtype=torch.float64)}, 1)
    assert measured(start, []) == {}
    assert measured(start, [only_b]) == {}


@settings(max_examples=25, deadline=None)
@given(draw.data())
def test_it_is_what_dense_arithmetic_finds(data):
    clients, rank = data.draw(draw.integers(1, 5)), data.draw(draw.integers(1, 4))
    shapes = {n: data.draw(draw.tuples(*[draw.integers(1, 9)] * 2)) for n in ("q", "v")}
    counts = data.draw(draw.lists(draw.integers(1, 9), min_size=clients, max_size=clients))
    scaling = data.draw(draw.sampled_from([0.25, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(data.draw(draw.integers(0, 99)))

    def make():
        made = {}
        for name, (out, width) in shapes.items():
            made[f"{name}.lora_A.weight"] = random(rank, width)
            made[f"{name}.lora_B.weight"] = random(out, rank)
        return made

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scalings = {"q.scaling": torch.tensor(scaling), "v.scaling": torch.tensor(1.0)}
    updates = [Update(str(i), 1, "", make(), n) for i, n in enumerate(counts)]
    start = {**make(), **scalings}
    after = FedAvg().aggregate(start_state(start), updates)

    def dense(tensors, name):
        factors = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        return scalings[f"{name}.scaling"].double() * factors

    total, parts = sum(counts), []
    for name in shapes:
        mean = sum(n * dense(u.tensors, name) for n, u in zip(counts, updates, strict=True)) / total
        parts.append((float((mean - dense(after.adapter, name)).norm()), float(mean.norm())))
        assert after.metrics[f"averaging_error/{name}"] == pytest.approx(
            parts[-1][0] / parts[-1][1], rel=1e-9, abs=1e-12
        )
    whole = [sum(one**2 for one in column) ** 0.5 for column in zip(*parts, strict=True)]
    assert after.metrics["averaging_error"] == pytest.approx(
        whole[0] / whole[1], rel=1e-9, abs=1e-12
    )


def start_state(adapter):
    return FedAvg().init(adapter)


def test_beyond_the_columns_that_are_kept_it_is_an_estimate_in_constant_memory(
    monkeypatch, make_adapter, make_update
):
    start = make_adapter(0, layers={"q": (60, 80)}, head=False)
    updates = [make_update(make_adapter(k, layers={"q": (60, 80)})) for k in range(1, 30)]
    for update in updates:
        del update.tensors["head.weight"], update.tensors["head.bias"], update.tensors["q.scaling"]
    exact = measured(start, updates)["averaging_error"]
    monkeypatch.setattr(drift, "_COLUMNS", 16)
    error = AveragingError(start, "examples")
    held = 0
    for _ in error.watching(updates):
        [layer] = error._layers.values()
        held = max(held, sum(u.shape[1] for u in layer.u))
    mean = weighted_mean(updates, start, "examples")
    assert held < 16
    assert error.metrics({**start, **mean})["averaging_error"] == pytest.approx(exact, rel=0.1)


def test_an_estimate_is_held_against_whatever_factors_follow_too(
    monkeypatch, make_adapter, make_update
):
    start = make_adapter(0, layers={"q": (60, 80)}, head=False)
    updates = [make_update(make_adapter(k, layers={"q": (60, 80)})) for k in range(1, 9)]
    follow = {**start, A: start[A] + 1.0, B: 0.5 * start[B]}
    found = []
    for columns in (256, 16):
        monkeypatch.setattr(drift, "_COLUMNS", columns)
        error = AveragingError(start, "examples", loose=True)
        list(error.watching(updates))
        found.append(error.metrics(follow)["averaging_error"])
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_the_deviations_are_what_averaging_loses(make_adapter, make_update, products):
    start = make_adapter(0, dtype=torch.float64)
    updates = [make_update(make_adapter(k, dtype=torch.float64), num_examples=k) for k in (1, 2, 3)]
    error = AveragingError(start, "examples", whole=True)
    mean = weighted_mean(error.watching(updates), start, "examples")
    dense = [products(u.tensors) for u in updates]
    for layer, (u, v) in error.deviations(mean).items():
        wanted = sum(k * one[layer] for k, one in enumerate(dense, 1)) / 6
        assert_close(2.0 * u @ v, wanted - products(mean)[layer])
