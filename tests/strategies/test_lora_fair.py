import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw
from torch.testing import assert_close

from strategies.base import Update
from strategies.fedavg import FedAvg
from strategies.lora_fair import LoRAFAIR

A, B, S = "q.lora_A.weight", "q.lora_B.weight", "q.scaling"


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(draw.data())
def test_the_correction_is_the_minimiser_that_dense_arithmetic_finds(data):
    out, width = data.draw(draw.tuples(draw.integers(1, 9), draw.integers(1, 9)))
    rank, clients = data.draw(draw.integers(1, 4)), data.draw(draw.integers(1, 5))
    strength = data.draw(draw.sampled_from([1e-3, 0.01, 1.0, 100.0]))
    counts = data.draw(draw.lists(draw.integers(1, 9), min_size=clients, max_size=clients))
    generator = torch.Generator().manual_seed(data.draw(draw.integers(0, 99)))
    start = {A: random(generator, rank, width), B: random(generator, out, rank)}
    updates = [
        Update(str(k), 1, "", {n: random(generator, *t.shape) for n, t in start.items()}, n)
        for k, n in enumerate(counts)
    ]
    start[S] = torch.tensor(data.draw(draw.sampled_from([0.5, 2.0])))
    after = LoRAFAIR(regularization=strength).aggregate(LoRAFAIR().init(start), updates).adapter

    total = sum(counts)
    a = sum(n * u.tensors[A] for n, u in zip(counts, updates, strict=True)) / total
    b = sum(n * u.tensors[B] for n, u in zip(counts, updates, strict=True)) / total
    mean = sum(n * u.tensors[B] @ u.tensors[A] for n, u in zip(counts, updates, strict=True))
    # least squares with |D| as further rows: [A^T; sqrt(l) I] (B + D - B)^T = [(M - B A)^T; 0]
    rows = torch.cat([a.T, strength**0.5 * torch.eye(rank, dtype=a.dtype)])
    wanted = torch.cat([(mean / total - b @ a).T, torch.zeros(rank, out, dtype=a.dtype)])
    d = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    assert_close(after[A], a, rtol=1e-10, atol=1e-10)
    assert_close(after[B], b + d, rtol=1e-7, atol=1e-9)


@pytest.fixture
def updates(make_adapter, make_update):
    """Updates of three clients that moved everything."""
    drawn = [make_adapter(seed, dtype=torch.float64) for seed in (1, 2, 3)]
    return [
        make_update({n: t for n, t in one.items() if not n.endswith("scaling")}) for one in drawn
    ]


@pytest.fixture
def state(make_adapter):
    return LoRAFAIR().init(make_adapter(dtype=torch.float64))


def test_held_hard_it_is_fedavg(state, updates):
    held = LoRAFAIR(regularization=1e15).aggregate(state, updates).adapter
    for name, tensor in FedAvg().aggregate(state, updates).adapter.items():
        assert_close(held[name], tensor)


def test_what_is_left_is_outside_of_the_rows_of_the_mean_a(state, updates, products):
    after = LoRAFAIR(regularization=1e-14).aggregate(state, updates)
    dense = [products({**state.adapter, **u.tensors}) for u in updates]
    for layer, product in products(after.adapter).items():
        mean = sum(one[layer] for one in dense) / 3
        left = mean - product
        assert_close(
            left @ after.adapter[f"{layer}.lora_A.weight"].T,
            torch.zeros(1).double().expand(left.shape[0], 4),
            atol=1e-9,
            rtol=0,
        )
        told = after.metrics[f"corrected_error/{layer}"]
        assert told == pytest.approx(float(left.norm() / mean.norm()), rel=1e-9)
        assert told < after.metrics[f"averaging_error/{layer}"]


def test_clients_that_share_a_need_no_correction(state, make_adapter, make_update):
    trained = []
    for seed in (1, 2):
        made = make_adapter(seed, dtype=torch.float64)
        same = {n: t for n, t in state.adapter.items() if ".lora_A." in n}
        tensors = {n: t for n, t in made.items() if not n.endswith("scaling")} | same
        trained.append(make_update(tensors))
    after = LoRAFAIR().aggregate(state, trained).adapter
    for name, tensor in FedAvg().aggregate(state, trained).adapter.items():
        assert_close(after[name], tensor)
