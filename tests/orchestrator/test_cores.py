"""Runs whose clients train cores between frozen factors."""

import pytest
import torch

from clients.wire import unpack
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.merging import task_vector

QUERY = "encoder.layer.0.attention.self.query"
ADAPTER = {"name": "lora-sb", "r": 2, "layers": [0], "target_modules": ["query"]}


@pytest.fixture
def refused(home, tiny):
    """Return a function that says why a run is refused."""

    def why(**changes):
        with pytest.raises(BadConfig) as caught:
            plan_of(tiny(**changes), home.store, home.ledger)
        return str(caught.value)

    return why


def test_a_run_from_public_data_sends_cores_and_makes_a_plain_product(home, tiny, notes, kept):
    config = tiny(
        strategy="fed-sb",
        adapter={**ADAPTER, "init": "gradient", "init_step": 0.01},
        init_data={"data": notes("public"), "public": True},
        retention="all",
    )
    version = service.launch(home, config, backend=InlineBackend())

    cores = []
    for digest in kept(home).values():
        update = unpack(home.store.updates.read(digest))
        assert [n for n in update.tensors if "lora" in n] == [f"{QUERY}.lora_core.weight"]
        cores.append(update.tensors[f"{QUERY}.lora_core.weight"])
    tensors = home.store.tensors(version)
    core = tensors[f"{QUERY}.lora_core.weight"]
    torch.testing.assert_close(core, (cores[0] + cores[1]) / 2)  # as many examples each
    plain = task_vector(home.store, home.store.version(version))
    b, a = (plain[f"{QUERY}.lora_{side}.weight"] for side in "BA")
    whole = tensors[f"{QUERY}.lora_B.weight"] @ core @ tensors[f"{QUERY}.lora_A.weight"]
    torch.testing.assert_close(b @ a, whole)
    assert {one.outcome for one in service.replay(home, version, whole=True)} == {"same"}


def test_cores_without_an_adapter_that_has_them_are_refused(refused):
    why = refused(strategy="fed-sb", adapter={"name": "lora", "r": 2})
    assert "strategy 'fed-sb' trains cores between frozen factors, and adapter 'lora' has" in why
    assert "use adapter lora-sb" in why


@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora", "flora"])
def test_a_strategy_of_plain_products_is_refused_on_cores(refused, strategy):
    why = refused(strategy=strategy, adapter=ADAPTER)
    assert f"strategy '{strategy}' needs plain factors B and A, and adapter 'lora-sb' has" in why


def test_an_average_of_all_that_trains_takes_cores_too(home, tiny):
    assert plan_of(tiny(strategy="fedavg", adapter=ADAPTER), home.store, home.ledger)


@pytest.mark.parametrize("rule", ["norm-clip", "geometric-median", "median"])
def test_a_robust_rule_goes_with_cores(home, tiny, rule):
    hostile = {} if rule == "norm-clip" else {"hostile": 0}
    strategy = {"name": rule, "inner": "fed-sb", **hostile}
    config = tiny(strategy=strategy, adapter={**ADAPTER, "init": "orthogonal"})
    tensors = home.store.tensors(service.launch(home, config, backend=InlineBackend()))
    assert tensors[f"{QUERY}.lora_core.weight"].any()
