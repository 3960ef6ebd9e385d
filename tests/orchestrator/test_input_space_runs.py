"""Runs whose new adapters do not react to what earlier tasks put into a layer: GPM and InfLoRA."""

import pytest
import torch

from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of

LABELS = (["cat", "dog"], ["model", "rank"])
SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
METHODS = {
    "gpm": {"strategy": "fedavg", "optimizer": SGD, "regularizers": [{"name": "gpm"}]},
    "inflora": {"strategy": "ffa-lora", "regularizers": [{"name": "inflora", "threshold": 0.9}]},
}


@pytest.fixture
def launch(home, tiny):
    """Return a function that runs a task of two labels and returns its version."""

    def run(number, **changes):
        own = {"task_labels": LABELS[number % 2], "seed": number, "retention": "all"}
        config = tiny(name=f"task-{number}", **own, **changes)
        return service.launch(home, config, backend=InlineBackend())

    return run


@pytest.mark.parametrize("name", METHODS)
def test_a_second_task_does_not_react_to_what_the_first_one_used(home, launch, name):
    first = launch(1, **METHODS[name])
    second = launch(2, start="stack", start_from=first, **METHODS[name])
    known = home.store.memory(first)
    trained = home.store.tensors(second)
    layers = [n.removesuffix(".lora_A.weight") for n in trained if n.endswith(".lora_A.weight")]
    for layer in layers:
        used = known[f"{name}/{layer}.used"]
        assert 0 < len(used) <= used.shape[1] // 2
        torch.testing.assert_close(used @ used.T, torch.eye(len(used)), rtol=0, atol=1e-5)
        a = trained[f"{layer}.lora_A.weight"]
        assert (used @ a.T).abs().max() < 1e-5 * a.norm()
        assert trained[f"{layer}.lora_B.weight"].any()
    after = home.store.memory(second)
    assert after[f"{name}/tasks"] == 2
    assert not any("design" in key for key in after)
    assert {one.outcome for one in service.replay(home, second, whole=True)} == {"same"}


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("inflora", {"strategy": "fedavg"}, "'inflora' .* needs .*lora_A.weight frozen"),
        ("inflora", {"strategy": "fedsvd"}, "'inflora' chooses from data .* 'fedsvd' chooses it"),
        ("inflora", {"adapter": {"name": "lora-sb", "r": 2}, "strategy": "fed-sb"}, "do nothing"),
        ("inflora", {"start": "continue"}, "'inflora' keeps a new .* use start: stack"),
        ("inflora", {"privacy": {"epsilon": 8, "delta": 1e-3}}, "memory from data, which is not"),
        ("gpm", {"privacy": {"epsilon": 8, "delta": 1e-3}}, "memory from data, which is not"),
        ("gpm", {"strategy": "ffa-lora"}, "'gpm' .* do nothing"),
        ("gpm", {"optimizer": {"name": "adamw"}}, "'gpm' holds .* 'adamw' .* use sgd"),
    ],
)
def test_what_would_leave_the_free_space_or_tell_of_people_is_refused(
    home, tiny, launch, name, changes, why
):
    config = {**METHODS[name], **changes}
    if "start" in changes:
        config["start_from"] = launch(1, strategy="ffa-lora")
    with pytest.raises(BadConfig, match=why):
        plan_of(tiny(**config), home.store, home.ledger)
