from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ServerState
from strategies.fedavg import FedAvg
from strategies.tensors import BadUpdate

COUNTS = [1, 2, 5]


@pytest.fixture
def state(make_adapter):
    return FedAvg().init(make_adapter(dtype=torch.float64))


def updates_differing_in(make_adapter, make_update, state, factors):
    """Updates whose clients changed only the tensors named in ``factors``."""
    result = []
    for seed, count in enumerate(COUNTS, start=1):
        other = make_adapter(seed, dtype=torch.float64)
        tensors = {
            name: other[name] if any(f in name for f in factors) else tensor
            for name, tensor in state.adapter.items()
            if not name.endswith(".scaling")
        }
        result.append(make_update(tensors, f"client-{seed}", count))
    return result


def mean_product(updates, state, products):
    dense = [products({**state.adapter, **u.tensors}) for u in updates]
    return {
        layer: sum(n * d[layer] for n, d in zip(COUNTS, dense, strict=True)) / sum(COUNTS)
        for layer in dense[0]
    }


def test_one_client_gets_back_what_it_trained(make_adapter, make_update, state):
    update = make_update(
        updates_differing_in(make_adapter, make_update, state, ["lora"])[0].tensors
    )
    after = FedAvg().aggregate(state, [update]).adapter
    assert all(torch.equal(after[name], tensor) for name, tensor in update.tensors.items())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_the_product_is_exact_where_clients_differ_in_one_factor(
    make_adapter, make_update, products, state, factor
):
    updates = updates_differing_in(make_adapter, make_update, state, [factor])
    after = FedAvg().aggregate(state, updates).adapter
    assert_close(products(after), mean_product(updates, state, products))


def test_the_error_of_averaging_factors_is_their_covariance(
    make_adapter, make_update, products, state
):
    updates = updates_differing_in(make_adapter, make_update, state, ["lora"])
    after = FedAvg().aggregate(state, updates).adapter
    exact, inexact = mean_product(updates, state, products), products(after)
    for layer in exact:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        covariance = sum(
            n * (u.tensors[b] - after[b]) @ (u.tensors[a] - after[a])
            for n, u in zip(COUNTS, updates, strict=True)
        ) / sum(COUNTS)
        drift = exact[layer] - inexact[layer]
        assert_close(drift, 2.0 * covariance)  # 2.0 is the adapter's scaling
        assert drift.norm() > 0.1 * exact[layer].norm()


def test_the_error_is_told_unless_it_is_not_wanted(make_adapter, make_update, state):
    updates = updates_differing_in(make_adapter, make_update, state, ["lora"])
    told, silent = (FedAvg(averaging_error=wanted).aggregate(state, updates) for wanted in (1, 0))
    assert told.metrics["averaging_error"] > 0
    assert silent.metrics == {}
    assert all(torch.equal(silent.adapter[n], t) for n, t in told.adapter.items())


def test_uniform_weighting_does_not_look_at_the_examples(make_update):
    state = ServerState({"head.bias": torch.zeros(1)})
    updates = [
        make_update({"head.bias": torch.tensor([v])}, num_examples=n)
        for v, n in [(0.0, 1), (2.0, 10), (4.0, 1000)]
    ]
    after = FedAvg(weighting="uniform").aggregate(state, updates)
    assert after.adapter["head.bias"] == torch.tensor([2.0])


def test_a_declared_weight_counts_where_a_label_is_asked_for(make_update):
    state = ServerState({"head.bias": torch.zeros(1)})
    updates = [
        replace(make_update({"head.bias": torch.tensor([v])}, num_examples=9), declared=w)
        for v, w in [(0.0, 0.5), (4.0, 1.5)]
    ]
    after = FedAvg(weighting="label:beds").aggregate(state, updates)
    assert after.adapter["head.bias"] == torch.tensor([3.0])


@pytest.mark.parametrize("weight", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_an_update_without_a_declared_weight_is_refused_where_one_counts(make_update, weight):
    state = ServerState({"head.bias": torch.zeros(1)})
    update = replace(make_update({"head.bias": torch.ones(1)}), declared=weight)
    with pytest.raises(BadUpdate, match="must be a number > 0"):
        FedAvg(weighting="label:beds").aggregate(state, [update])


def test_tensors_that_nobody_trained_keep_their_value(make_adapter, make_update, state):
    update = make_update({"head.bias": torch.ones(3, dtype=torch.float64)})
    after = FedAvg().aggregate(state, [update]).adapter
    assert torch.equal(after["head.bias"], update.tensors["head.bias"])
    assert all(after[n] is state.adapter[n] for n in after if n != "head.bias")
