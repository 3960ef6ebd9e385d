import math
import re

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ClientSpec
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALoRA
from strategies.tensors import NotLowRank

LAYER = "encoder.query"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
EYE = torch.eye(4, dtype=torch.float64)


@pytest.fixture
def adapter(make_adapter):
    return make_adapter(dtype=torch.float64)


@pytest.fixture
def trained_b(make_adapter, make_update):
    """Updates with other B and head: of client ``seed`` for every seed and number of examples."""

    def updates(*clients, **options):
        for seed, count in clients:
            tensors = make_adapter(seed, dtype=torch.float64, **options)
            names = [n for n in tensors if ".lora_B." in n or n.startswith("head.")]
            yield make_update({n: tensors[n] for n in names}, f"client-{seed}", count)

    return updates


def test_b_and_head_are_trained_and_a_is_not(adapter):
    regex = FedSVD().broadcast(FedSVD().init(adapter), ClientSpec("a")).trainable
    names = {n for n in adapter if re.fullmatch(regex, n)}
    assert names == {B, "encoder.value.lora_B.weight", "head.weight", "head.bias"}


def test_round_1_runs_with_a_as_it_was_drawn(adapter):
    first = FedSVD().init(adapter).adapter
    assert all(torch.equal(first[n], adapter[n]) for n in adapter)


def test_the_new_product_is_the_mean_b_times_the_old_a(adapter, trained_b, products):
    after = FedSVD().aggregate(FedSVD().init(adapter), trained_b((1, 1), (2, 3))).adapter
    first, second = trained_b((1, 1), (2, 3))
    mean = (first.tensors[B] + 3 * second.tensors[B]) / 4
    assert_close(after[B] @ after[A], mean @ adapter[A], rtol=0, atol=1e-10)


def test_the_new_a_is_an_orthonormal_basis_of_the_old_row_space(adapter, trained_b):
    after = FedSVD().aggregate(FedSVD().init(adapter), trained_b((1, 1), (2, 3))).adapter
    assert_close(after[A] @ after[A].T, EYE, rtol=0, atol=1e-10)
    q, _ = torch.linalg.qr(adapter[A].T)
    assert torch.linalg.svdvals(after[A] @ q).min() >= 1 - 1e-10


def test_the_new_b_is_diagonal_and_descending(adapter, trained_b):
    after = FedSVD().aggregate(FedSVD().init(adapter), trained_b((1, 1))).adapter
    gram = after[B].T @ after[B]
    assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
    assert torch.equal(gram.diagonal(), gram.diagonal().sort(descending=True).values)


def test_the_result_does_not_depend_on_alpha(make_adapter, trained_b):
    one, sixteen = (
        FedSVD()
        .aggregate(
            FedSVD().init(make_adapter(dtype=torch.float64, scaling=scaling)),
            trained_b((1, 1), (2, 3)),
        )
        .adapter
        for scaling in (1.0, 16.0)
    )
    assert torch.equal(one[A], sixteen[A])
    assert torch.equal(one[B], sixteen[B])
    assert sixteen[f"{LAYER}.scaling"] == 16.0


@pytest.mark.parametrize("rank_of_b", [0, 1])
def test_a_deficient_b_does_not_lead_a_out_of_its_row_space(adapter, make_update, rank_of_b):
    b = torch.zeros(7, 4, dtype=torch.float64)
    b[:rank_of_b, 0] = 1.0
    after = FedSVD().aggregate(FedSVD().init(adapter), [make_update({B: b})]).adapter
    q, _ = torch.linalg.qr(adapter[A].T)
    assert torch.linalg.svdvals(after[A] @ q).min() >= 1 - 1e-10
    assert_close(after[B] @ after[A], b @ adapter[A])


def test_the_head_is_averaged(adapter, trained_b):
    after = FedSVD().aggregate(FedSVD().init(adapter), trained_b((1, 1), (2, 3))).adapter
    first, second = trained_b((1, 1), (2, 3))
    mean = (first.tensors["head.bias"] + 3 * second.tensors["head.bias"]) / 4
    assert_close(after["head.bias"], mean)


def test_a_is_refactored_every_so_many_rounds(adapter, trained_b):
    strategy = FedSVD(every=3)
    state = strategy.init(adapter)
    kept = []
    for _ in range(6):
        after = strategy.aggregate(state, trained_b((1, 1)))
        kept.append(torch.equal(after.adapter[A], state.adapter[A]))
        state = after
    assert kept[:3] == [True, True, False]
    assert kept[3:5] == [True, True]
    assert int(state.auxiliary["round"]) == 6


def test_a_round_without_updates_advances_the_count_and_keeps_a(adapter, trained_b):
    strategy = FedSVD()
    state = strategy.aggregate(strategy.init(adapter), [])
    assert int(state.auxiliary["round"]) == 1
    assert torch.equal(state.adapter[A], adapter[A])


def test_orthonormal_makes_a_orthonormal_before_round_1(adapter, products):
    first = FedSVD(orthonormal=True).init(adapter).adapter
    assert_close(first[A] @ first[A].T, EYE, rtol=0, atol=1e-10)
    assert_close(products(first), products(adapter))


def test_row_scale_is_the_norm_of_the_new_rows(adapter, trained_b, products):
    strategy = FedSVD(row_scale=1 / math.sqrt(3))
    after = strategy.aggregate(strategy.init(adapter), trained_b((1, 1))).adapter
    plain = FedSVD().aggregate(FedSVD().init(adapter), trained_b((1, 1))).adapter
    assert_close(after[A] @ after[A].T, EYE / 3)
    assert_close(products(after), products(plain))


def test_an_adapter_without_low_rank_layers_is_refused():
    with pytest.raises(NotLowRank):
        FedSVD().init({"head.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("clip", "noise"), [(math.inf, 0.0), (0.5, 0.0), (0.5, 0.1)], ids=["sgd", "clip", "noise"]
)
def test_under_sgd_it_is_ffa_lora_with_an_orthonormal_a(
    adapter, products, make_update, clip, noise
):
    """The bases differ by a rotation Q, to which SGD, clipping and isotropic noise are blind."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 20, 12, generator=generator, dtype=torch.float64)  # client, example
    targets = torch.randn(5, 20, 7, generator=generator, dtype=torch.float64)
    adapter[B] = torch.zeros_like(adapter[B])
    strategies = [FFALoRA(orthonormal=True), FedSVD(orthonormal=True)]
    states = [s.init(adapter) for s in strategies]
    basis = states[0].adapter[A]

    def local(tensors, client, noises):
        a, b = tensors[A], tensors[B]
        for xi in noises:
            hidden = inputs[client] @ a.T
            residual = 2.0 * hidden @ b.T - targets[client]
            gradients = residual[:, :, None] * hidden[:, None, :]
            norms = gradients.flatten(1).norm(dim=1)[:, None, None]
            clipped = (gradients * (clip / norms).clamp(max=1.0)).mean(dim=0)
            b = b - 0.05 * (clipped + noise * xi @ basis @ a.T)
        return make_update({B: b}, f"client-{client}", num_examples=10 + client)

    for cohort in ([0, 1, 2], [3], [1, 4], [0, 2, 3, 4], [2, 4], [0, 1, 2, 3, 4], [4], [1, 3]):
        noises = torch.randn(5, 4, 7, 4, generator=generator, dtype=torch.float64)
        states = [
            s.aggregate(state, [local(state.adapter, k, noises[k]) for k in cohort])
            for s, state in zip(strategies, states, strict=True)
        ]
    ffa, fedsvd = (products(state.adapter)[LAYER] for state in states)
    assert ffa.norm() > 0.1
    assert_close(fedsvd, ffa, rtol=0, atol=1e-13 * max(1.0, float(ffa.norm())))
    assert not torch.allclose(states[0].adapter[A], states[1].adapter[A], atol=1e-3)
