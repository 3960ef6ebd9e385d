"""Runs that learn a task after others: what earlier tasks have in common, and what they keep."""

import pytest
import torch

from clients.assignment import PluginChoice
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.merging import effective
from strategies.cores import cored_layers

LABELS = (["cat", "dog"], ["model", "rank"])


@pytest.fixture
def launch(home, tiny):
    """Return a function that runs a task of two labels and returns its version."""

    def run(number, **changes):
        own = {"task_labels": LABELS[number % 2], "seed": number, "retention": "all"}
        config = tiny(name=f"task-{number}", **own, **changes)
        return service.launch(home, config, backend=InlineBackend())

    return run


def test_entries_of_a_lori_task_stay_bit_identical_when_the_next_is_learned(home, launch, products):
    lori = {"name": "lori", "sparsity": 0.75}
    first = launch(1, strategy=lori, rounds=2)
    on_top = {"start": "stack", "start_from": first, "library": [first]}
    second = launch(2, strategy=lori, rounds=2, **on_top)

    one, two = (home.store.tensors(version) for version in (first, second))
    whole = effective(home.store, home.store.version(second))
    merged = home.store.tensors(
        service.merge(home, [first, second], PluginChoice("linear", {}), "both")
    )
    learned = 0
    for name in (n for n in one if ".lora_B." in n):
        other = name.replace("lora_B", "lora_A")
        mine, theirs = one[name] != 0, two[name] != 0
        assert not (mine & theirs).any()
        assert torch.equal(merged[name][mine], one[name][mine])
        assert torch.equal(merged[name], one[name] + two[name])
        assert torch.equal(merged[other], one[other])
        learned += int(theirs.sum())
    assert learned  # and the second task has entries of its own
    sums, parts = products(whole), [products(home.store.tensors(v)) for v in (first, second)]
    for layer, product in products(merged).items():
        torch.testing.assert_close(product, parts[0][layer] + parts[1][layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(sums[layer], product, rtol=0, atol=1e-12)


def test_a_basis_grows_by_what_a_new_task_needs_and_keeps_what_was_learned(home, launch, products):
    found = [launch(n, strategy="ffa-lora", adapter=lora(1), rounds=1) for n in (1, 2)]
    eigen = {"name": "eigenlorax", "energy": 0.999}
    cores = {"name": "lora-sb", "r": 1, "layers": [0]}
    third = launch(3, strategy=eigen, adapter=cores, library=found)
    grown = ranks(home, third)
    assert min(grown) >= 1
    assert max(grown) == 2  # two tasks of one direction each

    another = launch(4, strategy="ffa-lora", adapter=lora(2), rounds=1)
    on = {"start": "continue", "start_from": third, "library": [another]}
    fifth = launch(5, strategy=eigen, adapter=cores, **on)
    assert max(ranks(home, fifth)) == 4
    start = home.store.version(home.store.version(fifth).parents[0].id)
    assert start.metrics["carried_energy"] > 0.99
    assert {one.outcome for one in service.replay(home, fifth, whole=True)} == {"same"}
    for layer, product in products(effective(home.store, start)).items():
        before = products(effective(home.store, home.store.version(third)))[layer]
        assert (product - before).norm() < 0.05 * before.norm()


def lora(rank):
    return {"name": "lora", "r": rank, "layers": [0]}


def ranks(home, version):
    return [len(one.core) for one in cored_layers(home.store.tensors(version)).values()]


def test_directions_of_earlier_tasks_are_frozen_and_their_magnitudes_train_on(
    home, launch, products
):
    adapter = {"name": "sd-lora", "r": 2, "layers": [0]}
    first = launch(1, strategy="sd-lora", adapter=adapter)
    second = launch(2, strategy="sd-lora", adapter=adapter, start="continue", start_from=first)
    begun = home.store.version(second).parents[0].id
    start, end = home.store.tensors(begun), home.store.tensors(second)
    learned, kept = (effective(home.store, home.store.version(v)) for v in (first, begun))
    for layer, product in products(learned).items():
        torch.testing.assert_close(products(kept)[layer], product, rtol=1e-5, atol=1e-6)
    past = [name for name in end if ".past_" in name]
    assert len(past) == 4
    assert all(torch.equal(end[name], start[name]) for name in past)
    for name in (n for n in end if n.endswith(".lora_magnitudes")):
        assert (end[name] != start[name]).all()
        assert end[name].shape == (2,)
    assert {one.outcome for one in service.replay(home, second, whole=True)} == {"same"}
