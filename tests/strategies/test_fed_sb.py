import re

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ClientSpec
from strategies.cores import cored_layers
from strategies.fed_sb import FedSB
from strategies.tensors import NotLowRank, lora_layers

A, B, CORE = (f"q.lora_{part}.weight" for part in ("A", "B", "core"))
LINE = {
    A: torch.tensor([[1.0, 0.0]]),
    B: torch.tensor([[0.0], [2.0]]),
    CORE: torch.tensor([[3.0]]),
    "q.scaling": torch.tensor(0.5),
}


def test_the_mean_of_cores_is_that_of_the_clients(make_update):
    updates = [
        make_update({CORE: torch.tensor([[core]])}, name, count)
        for name, core, count in (("a", 1.0, 3), ("b", 5.0, 1))
    ]
    after = FedSB().aggregate(FedSB().init(LINE), updates).adapter
    assert after[CORE].item() == 2.0
    assert after[A] is LINE[A]
    assert after[B] is LINE[B]


def test_a_client_sends_rank_squared_values_a_layer(make_adapter):
    adapter = make_adapter(rank=3, core=True, head=False)
    trainable = FedSB().broadcast(FedSB().init(adapter), ClientSpec("a")).trainable
    sent = {n: t for n, t in adapter.items() if re.fullmatch(trainable, n)}
    assert sum(t.numel() for t in sent.values()) == 2 * 3**2


def test_with_orthonormal_factors_a_change_is_as_large_as_its_core(make_adapter, products):
    adapter = make_adapter(dtype=torch.float64, core=True)
    for layer in cored_layers(adapter).values():
        layer.a.copy_(torch.linalg.qr(layer.a.T).Q.T)
        layer.b.copy_(torch.linalg.qr(layer.b).Q)
    dense = products(adapter)
    for name, layer in cored_layers(adapter).items():
        assert_close(dense[name].norm(), 2.0 * layer.core.norm())


def test_an_adapter_without_cores_is_refused(make_adapter):
    with pytest.raises(NotLowRank, match=r"'encoder\.query' has no core between its fac.*lora-sb"):
        FedSB().init(make_adapter())


def test_a_core_of_another_rank_is_refused():
    with pytest.raises(NotLowRank, match=r"core of shape \[2, 2\]; at its rank it must be \[1, 1"):
        cored_layers({**LINE, CORE: torch.eye(2)})


def test_a_core_is_no_plain_product():
    with pytest.raises(NotLowRank, match="a core between its factors, so that B A is not its del"):
        lora_layers(LINE)
