"""Runs whose strategy starts from adapters in the store."""

import pytest
import torch

from clients import models
from clients.adapters import ADAPTERS
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.merging import NotAModel, task_vector
from orchestrator.retraining import retrain

QUERY = "encoder.layer.0.attention.self.query"
LORA_SB = {"name": "lora-sb", "r": 3, "layers": [0]}


@pytest.fixture
def tasks(home, tiny):
    """Return the results of two runs of other ranks: one with DP and client a, one with b."""

    def launch(name, rank, client, **changes):
        adapter = {"name": "lora", "r": rank, "layers": [0]}
        config = tiny(
            name=name,
            strategy="ffa-lora",
            adapter=adapter,
            clients={"names": [client]},
            retention="all",
            **changes,
        )
        return service.launch(home, config, backend=InlineBackend())

    privacy = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    return launch("task-1", 2, "a", privacy=privacy), launch("task-2", 1, "b")


def test_a_run_starts_from_its_library_and_inherits_what_that_spent(home, tiny, tasks):
    config = tiny(
        name="task-3",
        strategy="eigenlorax",
        adapter=LORA_SB,
        library=["task-1", tasks[1][:12]],
        clients={"names": ["b"]},
        retention="all",
    )
    version = service.launch(home, config, backend=InlineBackend())

    [start] = [one.id for one in home.store.version(version).parents]
    begun = home.store.version(start)
    assert {(one.id, one.kind) for one in begun.parents} == {(v, "recycle") for v in tasks}
    assert begun.recipe["library"] == list(tasks)
    assert begun.metrics["captured_energy"] == pytest.approx(1.0)
    rows = home.store.tensors(start)[f"{QUERY}.lora_A.weight"]
    for task in tasks:
        a = task_vector(home.store, home.store.version(task))[f"{QUERY}.lora_A.weight"]
        torch.testing.assert_close(a @ rows.T @ rows, a)
    spent = {one.population: one.epsilon for one in service.lineage(home, version).epsilons}
    assert spent.keys() == {"a"}  # which took no part in this run
    assert spent == {
        one.population: one.epsilon for one in service.lineage(home, "task-1").epsilons
    }
    assert {one.outcome for one in service.replay(home, version, whole=True)} == {"same"}
    assert retrain(home, "task-3").differs == ""

    config = tiny(adapter=LORA_SB, strategy="eigenlorax", start="continue", start_from=version)
    assert plan_of(config, home.store, home.ledger).library == ()


def test_masks_of_runs_that_know_of_each_other_are_disjoint(home, tiny):
    versions = []
    for name in ("task-1", "task-2"):
        config = tiny(
            name=name,
            strategy={"name": "lori", "sparsity": 0.5},
            rounds=2,
            seed=len(versions),
            library=list(versions),
        )
        versions.append(service.launch(home, config, backend=InlineBackend()))
    one, two = (home.store.tensors(version) for version in versions)
    for name in (n for n in one if ".lora_B." in n):
        assert not ((one[name] != 0) & (two[name] != 0)).any()
    assert all(torch.equal(one[n], two[n]) for n in one if ".lora_A." in n)


@pytest.fixture
def other(home, tensors, tiny):
    """Return a function that commits a version with this run's base model, with changes."""

    def commit(name, made=None, **changes):
        plan = plan_of(tiny(), home.store, home.ledger)
        recipe = {
            "kind": "start",
            "model": {"id": None, "hash": plan.model.hash},
            "adapter": {"name": "lora", "options": {"r": 2}},
            "offset": None,
            "stack": [],
            "updates": [],
        }
        made = made or tensors(labels=0)
        version = home.store.commit(made, parents={}, recipe=recipe | changes)
        home.store.name(name, version)
        return version

    return commit


def test_a_check_names_the_versions_that_a_library_means(home, tiny, other, run_yaml, read, ok):
    plan = plan_of(tiny(), home.store, home.ledger)
    adapter = ADAPTERS.get("lora").build(**plan.adapter.options)
    shapes = models.shapes(plan.model, adapter)
    made = {n: torch.zeros(shape) for n, shape in shapes.items() if not n.startswith("head.")}
    version = other("one", made)
    path = run_yaml(strategy="lori", library=["one"])
    assert read("check", path)["library"] == [version]
    assert f"library        {version[:12]}\n" in ok("check", path)


@pytest.fixture
def refused(home, tiny):
    """Return a function that says why a run is refused."""

    def why(**changes):
        with pytest.raises((BadConfig, NotAModel)) as caught:
            plan_of(tiny(**changes), home.store, home.ledger)
        return str(caught.value)

    return why


def test_versions_that_are_no_library_are_refused_with_the_reason(refused, other, grow):
    grow("far")
    lori = {"strategy": "lori", "library": ["far"]}
    assert "library: far was trained on base model abababababab (some-model), this" in refused(
        **lori
    )
    other("more", adapter={"name": "dora", "options": {"r": 2}})
    why = refused(strategy="lori", library=["more"])
    assert why == (
        "library: more is a dora adapter, which is not a plain product B A; leave it out"
    )
    other("mine", personal=True, strategy={"name": "fedsa-lora"})
    assert "trained with fedsa-lora, by which a part" in refused(strategy="lori", library=["mine"])
    version = other("one")
    why = refused(strategy="lori", library=["one", version[:10]])
    assert why == f"library: one and {version[:10]} are one version; leave one"
    assert "none of the run's layers (it has 'q'" in refused(strategy="lori", library=["one"])


def test_a_library_that_nothing_is_made_of_is_refused(refused, other, notes):
    other("one")
    why = refused(strategy="fedsvd", library=["one"])
    assert why.startswith("library: strategy 'fedsvd' makes nothing of adapters in the store; use")
    assert "names none; give library: [refs]" in refused(strategy="eigenlorax", adapter=LORA_SB)
    init = {"adapter": {"name": "lora", "r": 2, "init": "pissa"}}
    why = refused(strategy="lori", library=["one"], **init)
    assert "adapter 'lora' (as set) starts from factors that its init makes" in why
    init = {"adapter": LORA_SB | {"init": "gradient"}}
    public = {"init_data": {"data": notes("public"), "public": True}}
    why = refused(strategy="eigenlorax", library=["one"], **init, **public)
    assert "adapter 'lora-sb' (as set) starts from factors that its init makes" in why
