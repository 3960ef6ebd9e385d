"""Runs that train cores between columns and rows of the base weights, task after task."""

import pytest
import torch
from safetensors.torch import load_file

from clients.models import unshared
from clients.wire import unpack
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.merging import BadMerge

QUERY = "encoder.layer.0.attention.self.query"
CORE, COLUMNS, ROWS = f"{QUERY}.lora_core.weight", f"{QUERY}.columns", f"{QUERY}.rows"
ADAPTER = {"name": "curlora", "r": 4, "layers": [0], "target_modules": ["query"]}


@pytest.fixture
def tasks(home, tiny):
    """Return the results of two tasks, of which the second goes on from the first."""
    versions = []
    for name in ("task-1", "task-2"):
        on = {"start": "continue", "start_from": versions[-1]} if versions else {}
        config = tiny(
            name=name, strategy="fed-sb", adapter=ADAPTER, seed=len(versions), retention="all", **on
        )
        versions.append(service.launch(home, config, backend=InlineBackend()))
    return versions


def test_one_core_is_trained_through_all_tasks_between_the_same_columns_and_rows(
    home, tiny, tasks, kept, tmp_path
):
    one, two = (home.store.tensors(version) for version in tasks)
    adapter = {name for name in two if not name.startswith("head.")}
    assert adapter == {CORE, COLUMNS, ROWS, f"{QUERY}.scaling"}
    assert torch.equal(one[COLUMNS], two[COLUMNS])
    assert torch.equal(one[ROWS], two[ROWS])
    cores = [
        unpack(home.store.updates.read(digest)).tensors[CORE] for digest in kept(home).values()
    ]
    assert {len(core) for core in cores} == {4}
    torch.testing.assert_close(two[CORE], torch.stack(cores[-3:]).mean(0))  # as many examples each
    assert not torch.equal(one[CORE], two[CORE])
    assert {one.outcome for one in service.replay(home, tasks[1], whole=True)} == {"same"}

    service.export(home, tasks[1], tmp_path / "lora")
    files = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    b, a = (next(t for n, t in files.items() if f"lora_{side}" in n) for side in "BA")
    plan = plan_of(tiny(adapter=ADAPTER), home.store, home.ledger)
    weight = unshared(plan.model).get_submodule(QUERY).weight.detach()
    exact = weight[:, two[COLUMNS]] @ two[CORE] @ weight[two[ROWS]]
    torch.testing.assert_close(b @ a, exact, rtol=1e-4, atol=1e-6)


def test_what_sees_tensors_alone_refuses_it(home, tiny, tasks):
    with pytest.raises(BadMerge, match="is a curlora adapter, which is not a plain product B A"):
        service.merge(home, tasks, service.PluginChoice("cat", {}), "both")
    on_top = tiny(start="stack", start_from=tasks[0], strategy="fedavg")
    with pytest.raises(BadConfig, match=r"is a curlora adapter .* use start: continue"):
        plan_of(on_top, home.store, home.ledger)
    for strategy in ("fedsvd", "eigenlorax"):
        with pytest.raises(BadConfig, match=f"strategy '{strategy}' .* adapter 'curlora'"):
            plan_of(tiny(adapter=ADAPTER, strategy=strategy), home.store, home.ledger)


def test_a_rule_that_compares_products_is_refused_because_it_cannot_see_them(home, tiny):
    strategy = {"name": "geometric-median", "inner": "fed-sb", "hostile": 0}
    with pytest.raises(
        BadConfig, match="trains cores between frozen factors, and adapter 'curlora'"
    ):
        plan_of(tiny(adapter=ADAPTER, strategy=strategy), home.store, home.ledger)
