"""``weft diff``: what one version changed against another."""

import pytest
import torch

from orchestrator import service
from orchestrator.differences import BadDiff
from orchestrator.merging import NotAModel


def test_a_version_does_not_differ_from_itself(workspace, grow):
    grow("one", clients=["a"], metrics={"accuracy": 0.5})
    found = service.diff(workspace, "one", "one")
    assert found.change == pytest.approx(0, abs=1e-6)
    assert found.recipe == {}
    assert found.clients == ((), ())
    assert found.metrics == {"accuracy": (0.5, 0.5)}


def test_recipes_scores_and_clients_are_compared(workspace, grow):
    grow("one", clients=["a", "b"], metrics={"accuracy": 0.5, "f1": 0.1})
    changes = {"adapter": {"name": "lora", "options": {"r": 4, "init": "pissa"}}, "seed": 3}
    grow("two", clients=["b", "c"], metrics={"accuracy": 0.75}, **changes)
    found = service.diff(workspace, "one", "two")
    assert found.recipe == {
        "adapter.options.init": ("-", "pissa"),
        "adapter.options.r": (2, 4),
        "seed": ("-", 3),
    }
    assert found.metrics == {"accuracy": (0.5, 0.75), "f1": (0.1, None)}
    assert found.clients == (("a",), ("c",))


def test_what_is_frozen_underneath_counts(workspace, grow):
    below = grow("below")
    grow("on-top", stack=[below])
    alone = workspace.store.tensors("below")
    found = service.diff(workspace, "below", "on-top")
    own = workspace.store.tensors("on-top")
    added = own["q.scaling"] * own["q.lora_B.weight"] @ own["q.lora_A.weight"]
    assert found.change == pytest.approx(float(added.norm()), rel=1e-5)
    before = alone["q.scaling"] * alone["q.lora_B.weight"] @ alone["q.lora_A.weight"]
    assert found.norms[0] == pytest.approx(float(before.norm()), rel=1e-5)


def test_heads_are_compared_as_tensors(workspace, grow, tensors):
    recipe = workspace.store.version(grow("like")).recipe
    for name, value in (("one", 1.0), ("two", 2.0)):
        head = {"head.weight": torch.full((4,), value)}
        adapter = tensors(labels=0) | head
        version = workspace.store.commit(adapter, parents={}, recipe=recipe)
        workspace.store.name(name, version)
    found = service.diff(workspace, "one", "two")
    [head] = found.tensors
    assert (head.name, head.relative) == ("head.weight", pytest.approx(1.0))
    assert found.change == pytest.approx(0, abs=1e-6)


def test_a_method_that_is_not_low_rank_is_compared_tensor_by_tensor(workspace, grow):
    grow("one")
    grow("two", adapter={"name": "dora", "options": {"r": 2}})
    found = service.diff(workspace, "one", "two")
    assert found.layers == ()
    assert "q.lora_A.weight" in {x.name for x in found.tensors}


def test_versions_of_different_base_models_are_refused(workspace, grow):
    grow("one")
    grow("two", model={"id": "other", "hash": "cd" * 32, "labels": []})
    with pytest.raises(BadDiff, match=r"adapt different base models: abab.* and cdcd"):
        service.diff(workspace, "one", "two")


def test_an_offset_is_no_model_to_compare(workspace, grow):
    grow("one")
    grow("two", kind="offset")
    with pytest.raises(NotAModel):
        service.diff(workspace, "one", "two")


def test_a_difference_is_shown_and_read(ok, read, refused, grow):
    first = grow("bot", metrics={"accuracy": 0.5})
    second = grow("bot", [("bot", "round")], clients=["a"], metrics={"accuracy": 0.75})
    found = read("diff", "bot:v1", "bot:v2")
    assert (found["first"], found["second"]) == (first, second)
    [layer] = found["layers"]
    assert layer["relative"] == pytest.approx(layer["change"] / layer["norms"][0])
    assert found["metrics"] == {"accuracy": [0.5, 0.75]}
    shown = ok("diff", "bot:v1", "bot:v2")
    for wanted in ("+0.2500", "q", "input angles", "clients only there", "start", "round"):
        assert wanted in shown
    assert "did you mean 'bot'" in refused("diff", "bot", "bott")
