"""Clients of ranks of their own: who has which, what they are sent, and what is refused."""

import pytest
import torch

from clients.assignment import PluginChoice
from clients.wire import unpack
from clients.worker import perform
from orchestrator import service
from orchestrator.acceptance import refusal
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.ranks import adapter_at, rank_of
from orchestrator.sections import RankRule

BIG, SMALL = RankRule(where={"gpu": "a100"}, r=8), RankRule(names=("phone", "edge"), r=2)


def test_the_first_rule_that_fits_gives_a_client_its_rank():
    rules = (BIG, SMALL, RankRule(where={"gpu": "a100", "site": "north"}, r=1))
    assert rank_of(rules, "hospital", {"gpu": "a100", "site": "north"}) == 8
    assert rank_of(rules, "edge", {"gpu": "t4"}) == 2
    assert rank_of(rules, "edge", {"gpu": "a100"}) == 8
    assert rank_of(rules, "desk", {}) is None


def test_an_adapter_at_a_rank_has_no_layer_above_it():
    choice = PluginChoice("lora", {"r": 8, "alpha": 16, "rank_pattern": {"query": 16, "value": 2}})
    lower = adapter_at(choice, 4).options
    assert lower == {"r": 4, "alpha": 16, "rank_pattern": {"query": 4, "value": 2}}
    assert adapter_at(choice, None) is choice
    assert adapter_at(PluginChoice("lora", {"r": 8}), 8).options == {"r": 8}


@pytest.mark.parametrize("rule", [{"r": 2}, {"r": 2, "names": ["a"], "where": {"gpu": "t4"}}])
def test_a_rule_is_for_labels_or_for_names(tiny, rule):
    with pytest.raises(BadConfig, match="give either where"):
        tiny(ranks=[rule])


@pytest.fixture
def refused(home, tiny):
    """Return a function that says why a run with ranks is refused."""

    def why(rules=({"names": ["b"], "r": 1},), **changes):
        changes = {"strategy": "flexlora", **changes}
        with pytest.raises(BadConfig) as caught:
            plan_of(tiny(ranks=list(rules), **changes), home.store, home.ledger)
        return str(caught.value)

    return why


@pytest.mark.parametrize("strategy", ["fedavg", "fedsvd", "ffa-lora", "fedex-lora"])
def test_a_strategy_of_one_rank_is_refused(refused, strategy):
    assert f"ranks: strategy '{strategy}' takes factors of one rank only" in refused(
        strategy=strategy
    )


def test_a_rank_above_the_adapter_s_is_refused(refused):
    assert "ranks: 3 is above the adapter's r, 2" in refused([{"names": ["b"], "r": 3}])


def test_a_rule_for_nobody_is_refused(refused):
    assert "the first to fit where gpu=t4" in refused([{"where": {"gpu": "t4"}, "r": 1}])
    twice = [{"names": ["b"], "r": 2}, {"names": ["b"], "r": 1}]
    assert "the first to fit names b" in refused(twice)


def test_updates_that_may_be_stale_are_refused(refused):
    why = refused(
        strategy={"name": "hetlora", "weighting": "examples"},
        asynchronous={"buffer": 2, "concurrency": 2},
    )
    assert "ranks: an update of a lower rank cannot be moved onto a newer version" in why


def test_an_adapter_that_has_no_such_rank_is_refused(refused):
    adapter = {"name": "lora", "r": 2, "layers": [0], "init": "orthogonal"}
    assert "must be even and >= 2 for init 'orthogonal', got 1" in refused(adapter=adapter)


@pytest.mark.parametrize("strategy", ["flexlora", "flora", "hetlora"])
def test_a_run_of_several_ranks_is_made_again_to_the_same_versions(home, tiny, kept, strategy):
    pattern = {"value": 3}
    adapter = {"name": "rslora", "r": 2, "alpha": 6.0, "layers": [0], "rank_pattern": pattern}
    adapter["target_modules"] = ["query", "value"]
    rules = [{"names": ["b"], "r": 1}]
    config = tiny(strategy=strategy, adapter=adapter, ranks=rules, rounds=2, retention="all")
    version = service.launch(home, config, backend=InlineBackend())

    recipe = home.store.version(version).recipe
    assert recipe["ranks"] == [{"where": {}, "names": ["b"], "r": 1}]
    assert [leaf.get("rank") for leaf in recipe["updates"]] == [None, 1]
    updates = [unpack(home.store.updates.read(digest)) for digest in kept(home).values()]
    assert len(updates) == 4
    for update in updates:
        ranks = {n: t.shape[0] for n, t in update.tensors.items() if ".lora_A." in n}
        expected = {"query": 2, "value": 3} if update.client == "a" else {"query": 1, "value": 1}
        assert {n.split(".")[-3]: r for n, r in ranks.items()} == expected
    scalings = {n: t for n, t in home.store.tensors(version).items() if n.endswith(".scaling")}
    assert len(scalings) == 2
    assert all(
        torch.isclose(t, torch.tensor(6.0 / (3 if "value" in n else 2) ** 0.5))
        for n, t in scalings.items()
    )  # those of the adapter's own ranks, whoever trained

    assert {one.outcome for one in service.replay(home, version, whole=True)} == {"same"}
    found = service.retrain(home, "task-1")
    assert (found.versions, found.updates, found.differs) == (3, 4, "")


def test_an_update_of_another_rank_than_was_sent_is_refused(home, tiny, kept):
    asked = []

    def seen(assignment, *rest):
        asked.append(assignment)
        return perform(assignment, *rest)

    config = tiny(strategy="flexlora", ranks=[{"names": ["b"], "r": 1}], retention="all")
    service.launch(home, config, backend=InlineBackend(seen))

    by_client = {a.client: a for a in asked if a.action == "train"}
    small, large = by_client["b"], by_client["a"]
    assert (small.adapter.options["r"], large.adapter.options["r"]) == (1, 2)
    update = unpack(home.store.updates.read(kept(home)[(1, "b")]))
    assert refusal(update, small) is None
    assert "lora_A.weight is torch.float32 [1, 32], expected" in str(refusal(update, large))
