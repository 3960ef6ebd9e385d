"""What a strategy lays beneath its adapter is part of every version, wherever that is used."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import PluginChoice
from clients.session import opened
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.merging import effective, task_vector
from strategies.base import beneath

ADAPTER = {
    "name": "rslora",
    "r": 2,
    "target_modules": ["query", "value"],
    "layers": [0],
    "rank_pattern": {"query": 3},
    "alpha_pattern": {"value": 5.0},
}


def watched(asked):
    """Return a backend in this process that puts what it is asked into ``asked``."""

    def seen(assignment, *rest):
        asked.append(assignment)
        return perform(assignment, *rest)

    return InlineBackend(seen)


@pytest.fixture
def launched(home, tiny):
    """Return a function that runs two rounds and returns the version and what was asked."""

    def run(strategy="flora", **changes):
        asked = []
        changes = {"adapter": ADAPTER, "rounds": 2, **changes}
        version = service.launch(home, tiny(strategy=strategy, **changes), backend=watched(asked))
        return home.store.version(version), asked

    return run


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [{"name": "flora", "max_rank": 1}, "fedex-lora"])
def test_clients_start_from_what_the_committed_version_does(
    home, launched, notes, strategy, products
):
    version, asked = launched(strategy, evaluate={"data": notes("held", shift=5)}, rounds=3)

    bases = {a.base for a in asked if a.round > 1}
    assert len(bases) == 3
    for assignment in asked:
        if assignment.round > 1 or assignment.action == "evaluate":
            whole = effective(home.store, home.store.version(assignment.base))
            close(products(assignment.broadcast.tensors, assignment.underlay), products(whole))
    lying = beneath(home.store.auxiliary(version.id))
    assert all(dense.any() for dense in products(lying).values())
    below = {id(a.underlay) for a in asked if (a.action, a.round) == ("train", 2)}
    assert len(below) == 1  # one object for the round's clients
    scores = home.store.version(version.id).metrics
    assert "accuracy" in scores


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora"])
def test_a_version_is_made_again_with_what_lies_beneath_it(home, launched, strategy):
    version, _ = launched(strategy, retention="all")
    assert {one.outcome for one in service.replay(home, version.id, whole=True)} == {"same"}
    found = service.retrain(home, "task-1")
    assert (found.versions, found.differs) == (3, "")


@pytest.mark.parametrize("strategy", ["flora", "fedsvd"])
def test_a_run_that_continues_lies_on_what_its_start_lay_on(home, launched, strategy, products):
    first, _ = launched()
    second, asked = launched(strategy, name="task-2", start="continue", start_from=first.id)

    train = next(a for a in asked if (a.action, a.round) == ("train", 1))
    before = products(task_vector(home.store, first))
    close(products(train.broadcast.tensors, train.underlay), before)
    own = products(home.store.tensors(second.id), beneath(home.store.auxiliary(second.id)))
    close(products(task_vector(home.store, second)), own)


def test_what_is_stacked_and_merged_is_the_whole_version(home, launched, products):
    first, _ = launched()
    second, asked = launched("fedavg", name="task-2", start="stack", start_from=first.id)
    train = next(a for a in asked if a.action == "train")
    close(products(train.underlay), products(task_vector(home.store, first)))

    merged = service.merge(home, [first.id, second.id], PluginChoice("cat"), "both")
    parts = [task_vector(home.store, version) for version in (first, second)]
    close(products(home.store.tensors(merged)), products(*parts))
    assert home.store.auxiliary(merged) == {}
    shown = service.diff(home, first.id, second.id)
    expected = products(effective(home.store, second))
    norms = {layer.layer: layer.norms[1] for layer in shown.layers}
    assert norms == pytest.approx({n: float(d.norm()) for n, d in expected.items()}, rel=1e-5)


def test_plain_peft_computes_of_the_export_what_clients_trained_on(home, launched, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    version, asked = launched("fedex-lora", rounds=1)
    base = AutoModel.from_pretrained(asked[0].model.id).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        untouched = base(ids).last_hidden_state
        service.export(home, version.id, tmp_path / "export")
        exported = PeftModel.from_pretrained(base, tmp_path / "export")(ids).last_hidden_state
    lying = beneath(home.store.auxiliary(version.id))
    train = next(a for a in asked if a.action == "train")
    sent = replace(train.broadcast, tensors=home.store.tensors(version.id))
    on_top = replace(train, broadcast=sent, underlay=lying)
    with opened(on_top) as session, torch.no_grad():
        session.write(on_top.broadcast.tensors)
        used = session.model.backbone(ids, torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(used, exported, rtol=1e-4, atol=1e-5)
    assert float((exported - untouched).norm()) > 1e-3


@pytest.fixture
def refused(home, tiny):
    """Return a function that says why a run is refused."""

    def why(**changes):
        with pytest.raises(BadConfig) as caught:
            plan_of(tiny(**changes), home.store, home.ledger)
        return str(caught.value)

    return why


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora"])
def test_an_adapter_that_is_more_than_a_product_is_refused(refused, strategy):
    why = refused(strategy=strategy, adapter={"name": "dora", "r": 2, "layers": [0]})
    assert f"strategy '{strategy}' lays a part of what is learned beneath the adapter" in why
    assert "adapter 'dora' changes the base model by more than a product" in why


def test_a_memory_of_the_final_adapter_is_refused_where_that_is_not_all(refused):
    regularizers = [{"name": "o-lora", "form": "soft"}]
    why = refused(strategy="fedex-lora", regularizers=regularizers)
    assert "regularizer 'o-lora' remembers a task by its final adapter" in why


def test_a_start_with_a_product_goes_beneath_and_is_not_another(home, tiny, products):
    adapter = {"name": "lora", "r": 2, "layers": [0], "init": "pissa"}
    version = service.launch(home, tiny(strategy="flora", adapter=adapter), backend=InlineBackend())
    [start] = home.store.version(version).parents
    started = task_vector(home.store, home.store.version(start.id))
    assert all(float(dense.norm()) < 1e-5 for dense in products(started).values())
