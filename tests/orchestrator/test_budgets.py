"""Runs in which clients choose which ranks they train and send."""

from dataclasses import replace

import pytest
import torch

from clients.wire import unpack
from clients.worker import perform
from orchestrator import service
from orchestrator.acceptance import refusal
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from storage.ledger import ClientRecord

LORA_A2 = {"name": "lora-a2", "budget": 2, "probe": 0.5}
ADAPTER = {"name": "lora", "r": 16, "layers": [0]}  # on two linear layers of the block


def bytes_up(home, run):
    return sum(e.data["bytes"] for e in home.ledger.events(run) if e.kind == "accepted")


def test_clients_send_fewer_bytes_and_the_run_is_made_again(home, tiny, kept):
    shared = {"adapter": ADAPTER, "rounds": 2, "head": "freeze", "retention": "all"}
    version = service.launch(home, tiny(strategy=LORA_A2, **shared), backend=InlineBackend())
    updates = {who: unpack(home.store.updates.read(d)) for who, d in kept(home).items()}
    for update in updates.values():
        places = [len(t) for n, t in update.tensors.items() if n.endswith(":ranks")]
        assert (sum(places), len(places)) == (4, 2)  # two a layer, wherever they are
    assert {o.outcome for o in service.replay(home, version, whole=True)} == {"same"}
    [run] = home.ledger.runs()
    assert service.retrain(home, run.id).differs == ""

    service.launch(home, tiny(name="plain", strategy="rolora", **shared))
    [plain] = [r for r in home.ledger.runs() if r.name == "plain"]
    assert bytes_up(home, run.id) < bytes_up(home, plain.id) / 2


def test_with_a_budget_of_all_ranks_the_run_ends_with_rolora_s_tensors(home, tiny):
    ours, plain = (
        home.store.tensors(service.launch(home, tiny(name=name, strategy=strategy, rounds=2)))
        for name, strategy in (("ours", LORA_A2), ("plain", "rolora"))
    )
    assert all(torch.equal(t, plain[n]) for n, t in ours.items())


def test_an_update_of_more_ranks_than_the_budget_is_refused(home, tiny, kept):
    asked = []

    def seen(assignment, *rest):
        asked.append(assignment)
        return perform(assignment, *rest)

    service.launch(
        home, tiny(strategy=LORA_A2, adapter=ADAPTER, retention="all"), backend=InlineBackend(seen)
    )
    [own] = [a for a in asked if a.client == "a"]
    update = unpack(home.store.updates.read(kept(home)[(1, "a")]))
    assert refusal(update, own) is None
    names = [n for n in own.broadcast.tensors if ".lora_B." in n]
    every = {n: own.broadcast.tensors[n] for n in names}
    more = {n: t for n, t in update.tensors.items() if ".lora_" not in n} | every
    assert refusal(replace(update, tensors=more), own) == ("it holds 32 ranks, and its budget is 4")
    few = {n: t for n, t in update.tensors.items() if n != f"{names[0]}:ranks"}
    assert f"{names[0]} is torch.float32" in str(refusal(replace(update, tensors=few), own))
    nobody = replace(own, broadcast=replace(own.broadcast, extra={}))
    assert ":ranks is not asked for" in str(refusal(update, nobody))


def test_what_makes_no_sense_with_a_budget_is_refused(home, tiny):
    def why(**changes):
        with pytest.raises(BadConfig) as caught:
            plan_of(tiny(**changes), home.store, home.ledger)
        return str(caught.value)

    assert "leave uplink out, or use rolora" in why(strategy=LORA_A2, uplink=["fp16"])
    private = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    assert "which example-level privacy does not cover" in why(strategy=LORA_A2, privacy=private)
    home.ledger.add_client(
        ClientRecord("c", home.ledger.client("a").data, "c", num_examples=12, labels={"ranks": "x"})
    )
    assert "c has ranks=x, and a budget is a whole number" in why(
        strategy={**LORA_A2, "label": "ranks"}
    )


PRUNING = {"name": "hetlora", "prune": 0.5, "penalty": 1.0, "weighting": "examples"}


def test_clients_that_give_up_ranks_send_less_from_round_to_round(home, tiny, kept):
    adapter = {**ADAPTER, "r": 8}
    shared = {
        "adapter": adapter,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "ranks": [{"names": ["b"], "r": 4}],
        "steps": 4,
    }
    config = tiny(strategy=PRUNING, rounds=3, retention="all", **shared)
    version = service.launch(home, config, backend=InlineBackend())
    found = {
        who: {len(t) for n, t in unpack(home.store.updates.read(d)).tensors.items() if "_A." in n}
        for who, d in kept(home).items()
    }
    assert (max(found[1, "a"]), max(found[1, "b"])) == (8, 4)
    assert max(found[3, "a"]) < 8
    assert max(found[3, "b"]) < 4
    whole = home.store.tensors(version)
    assert {len(t) for n, t in whole.items() if ".lora_A." in n} == {8}
    assert {o.outcome for o in service.replay(home, version, whole=True)} == {"same"}
    [run] = home.ledger.runs()
    assert service.retrain(home, run.id).differs == ""


def test_factors_of_ranks_that_do_not_fit_are_refused_where_clients_may_give_some_up(
    home, tiny, kept
):
    asked = []

    def seen(assignment, *rest):
        asked.append(assignment)
        return perform(assignment, *rest)

    service.launch(home, tiny(strategy=PRUNING, retention="all"), backend=InlineBackend(seen))
    [own] = [a for a in asked if a.client == "a"]
    update = unpack(home.store.updates.read(kept(home)[(1, "a")]))
    a, b = (min(n for n in update.tensors if f".lora_{f}." in n) for f in "AB")
    assert refusal(update, own) is None
    one = {**update.tensors, a: update.tensors[a][:1], b: update.tensors[b][:, :1]}
    assert refusal(replace(update, tensors=one), own) is None
    odd = {**update.tensors, a: update.tensors[a][:1]}
    assert f"{a} is torch.float32 [1, 32], expected" in str(
        refusal(replace(update, tensors=odd), own)
    )
    never = replace(own, broadcast=replace(own.broadcast, extra={}))
    assert f"{a} is torch.float32 [1, 32]" in str(refusal(replace(update, tensors=one), never))
