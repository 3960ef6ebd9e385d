"""Which versions may be merged, what stays underneath, and which head the merge has."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import PluginChoice
from orchestrator.merging import (
    BadMerge,
    NotAModel,
    beneath,
    check_alike,
    common_stack,
    effective,
    merged_heads,
    split_head,
    stacked,
    task_vector,
)
from orchestrator.plan import Start
from orchestrator.recipes import offset_recipe, round_recipe
from orchestrator.service import merge

LABELS = ("cat", "dog", "model", "rank")


@pytest.fixture
def commit(workspace, make_plan, tensors):
    """Return a function that commits a version of drawn tensors and returns it."""

    def make(seed, task=LABELS, stack=(), rank=2, layers=("q",), model=None, adapter="lora"):
        plan = make_plan(task_labels=list(task), start=Start("fresh", None, tuple(stack)))
        plan = replace(plan, model=model or plan.model, adapter=PluginChoice(adapter, {"r": rank}))
        version = workspace.store.commit(
            tensors(seed, rank, layers), parents={}, recipe=round_recipe(plan, 1, [])
        )
        return workspace.store.version(version)

    return make


def product(tensors, layer="q"):
    a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    return float(tensors[f"{layer}.scaling"]) * b.double() @ a.double()


@pytest.fixture
def learned(commit):
    """Return a function that makes versions which learned these labels, and nothing else."""
    return lambda *tasks: [commit(seed, task=task) for seed, task in enumerate(tasks)]


def test_each_label_s_row_is_that_of_the_version_that_learned_it(learned):
    heads = [{"head.bias": torch.tensor([1.0, 2, 3, 4])}, {"head.bias": torch.tensor([5.0] * 4)}]

    merged = merged_heads(heads, learned(["cat"], ["dog", "rank"]), [1.0, 3.0])

    assert merged["head.bias"].tolist() == [1, 5, 3, 5]  # 'model' was learned by none: the first's


def test_a_row_that_several_learned_is_their_weighted_mean(learned):
    heads = [{"head.weight": torch.zeros(4, 3)}, {"head.weight": torch.full((4, 3), 4.0)}]

    merged = merged_heads(heads, learned(LABELS, LABELS), [1.0, 3.0])

    assert torch.equal(merged["head.weight"], torch.full((4, 3), 3.0))
    assert heads[0]["head.weight"].sum() == 0  # the arguments stay as they are


@pytest.mark.parametrize(
    ("weights", "row"), [((1.0, -0.9), 1.0), ((-1.0, 1.0), 5.0), ((-1.0, -1.0), 3.0), ((0, 0), 1.0)]
)
def test_a_version_that_is_taken_away_leaves_rows_to_those_that_are_added(learned, weights, row):
    heads = [{"head.bias": torch.ones(4)}, {"head.bias": torch.full((4,), 5.0)}]

    merged = merged_heads(heads, learned(LABELS, LABELS), weights)

    torch.testing.assert_close(merged["head.bias"], torch.full((4,), row))


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_that_went_on_from_another_replaces_it(commit, order):
    ground = commit(1, task=["cat", "dog"])
    top = commit(2, task=["dog", "rank"], stack=[ground.id])
    heads = [{"head.bias": torch.full((4,), 1.0)}, {"head.bias": torch.full((4,), 5.0)}]

    merged = merged_heads(heads[::order], [ground, top][::order], [1.0, 1.0])

    assert merged["head.bias"][[0, 1, 3]].tolist() == [1, 5, 5]


def test_versions_without_heads_merge_without_one(learned):
    assert merged_heads([{}, {}], learned(LABELS, LABELS), [1.0, 1.0]) == {}


def test_a_stack_of_adapters_is_the_exact_sum_of_their_products(tensors):
    below, top = tensors(1, rank=2, scaling=0.5), tensors(2, rank=3, scaling=2.0)

    one = stacked([below, top])

    torch.testing.assert_close(product(one), product(below) + product(top))
    assert not any(name.startswith("head.") for name in one)


def test_a_stack_of_none_is_empty_and_of_one_is_that_one(tensors):
    assert stacked([]) == {}
    [(name, own), *_] = split_head(tensors(1))[0].items()
    assert torch.equal(stacked([tensors(1)])[name], own)
    assert stacked([tensors(1)]).keys() == split_head(tensors(1))[0].keys()


def test_a_stacked_version_does_what_all_its_layers_do(workspace, commit):
    first = commit(1, task=["cat"])
    second = commit(2, task=["dog"], stack=[first.id], rank=1)

    whole = effective(workspace.store, second)

    own, below = workspace.store.tensors(second.id), workspace.store.tensors(first.id)
    torch.testing.assert_close(product(whole), product(own) + product(below))
    assert torch.equal(whole["head.weight"], own["head.weight"])


def test_a_task_and_what_was_stacked_on_it_merge_into_one_without_a_stack(workspace, commit):
    first = commit(1, task=["cat"])
    second = commit(2, task=["dog"], stack=[first.id])

    merged = workspace.store.version(
        merge(workspace, [first.id, second.id], PluginChoice("cat"), "both")
    )

    assert merged.recipe["stack"] == []
    torch.testing.assert_close(
        product(effective(workspace.store, merged)), product(effective(workspace.store, second))
    )
    assert merged.recipe["seen_labels"] == ["cat", "dog"]


def test_a_layer_underneath_that_is_not_in_the_merge_is_asked_for(commit):
    first, other = commit(1), commit(2)
    second = commit(3, stack=[first.id])

    with pytest.raises(BadMerge, match=f"on top of {first.id[:12]}, which is not in the merge; a"):
        common_stack([second, other])


def test_what_lies_under_all_stays_underneath_once(workspace, commit):
    ground = commit(1)
    left, right = commit(2, stack=[ground.id]), commit(3, stack=[ground.id])

    merged = workspace.store.version(
        merge(workspace, [left.id, right.id], PluginChoice("cat"), "both")
    )

    assert merged.recipe["stack"] == [ground.id]
    parts = [workspace.store.tensors(v.id) for v in (ground, left, right)]
    expected = sum(product(part) for part in parts)
    torch.testing.assert_close(product(effective(workspace.store, merged)), expected)


def test_weights_say_how_much_each_version_counts(workspace, commit):
    first, second = commit(1), commit(2, rank=3)

    merged = merge(workspace, [first.id, second.id], PluginChoice("cat"), "both", [1.0, -0.5])

    expected = product(workspace.store.tensors(first.id)) - 0.5 * product(
        workspace.store.tensors(second.id)
    )
    torch.testing.assert_close(product(workspace.store.tensors(merged)), expected)


def test_a_version_that_is_given_twice_is_refused(commit):
    version = commit(1)

    with pytest.raises(BadMerge, match="given twice; weights say how much"):
        check_alike([version, version], ["a", "a"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hash": "1" * 64}, "base model hash"),
        ({"kind": "causal-lm"}, "task kind"),
        ({"labels": ("dog", "cat")}, "label set"),
        ({"pooling": "cls"}, "pooling"),
    ],
)
def test_versions_that_do_not_belong_together_are_refused(commit, make_plan, change, what):
    ours = commit(1)
    theirs = commit(2, model=replace(make_plan().model, **change))

    with pytest.raises(BadMerge, match=f"task-1 and task-2 have different {what}s"):
        check_alike([ours, theirs], ["task-1", "task-2"])


def test_an_adapter_that_is_no_plain_product_is_refused(commit):
    with pytest.raises(BadMerge, match="task-2 is a dora adapter, which is not a plain product"):
        check_alike([commit(1), commit(2, adapter="dora")], ["task-1", "task-2"])


@pytest.fixture
def started(workspace, make_plan, tensors):
    """Return a function that commits a version over an offset, and returns both."""

    def make(seed, adapter="lora", stack=(), **more):
        plan = replace(make_plan(), adapter=PluginChoice(adapter, {"r": 2}))
        plan = replace(plan, start=Start("fresh", None, tuple(stack)))
        offset = tensors(seed + 100, labels=0, scaling=0.5)
        below = workspace.store.commit(offset, parents={}, recipe=offset_recipe(plan, None))
        own = tensors(seed) | more
        version = workspace.store.commit(own, parents={}, recipe=round_recipe(plan, 1, [], below))
        return workspace.store.version(version), own, offset

    return make


def test_a_version_changes_what_its_adapter_and_its_offset_change(workspace, started):
    version, own, offset = started(1)

    found = task_vector(workspace.store, version)

    torch.testing.assert_close(product(found), product(own) + product(offset))
    assert found["q.lora_A.weight"].shape == (4, 5)
    assert not any(name.startswith("head.") for name in found)


def test_a_diagonal_goes_into_the_plain_factors(workspace, started):
    version, own, offset = started(1, "kasa", **{"q.lora_diag": torch.tensor([3.0, -1.0])})

    found = task_vector(workspace.store, version)

    scaled = {**own, "q.lora_B.weight": own["q.lora_B.weight"] * torch.tensor([3.0, -1.0])}
    torch.testing.assert_close(product(found), product(scaled) + product(offset))
    assert not any("lora_diag" in name for name in found)


def test_what_lies_beneath_a_run_is_each_version_with_its_offset_and_its_own(workspace, started):
    first, own, offset = started(1)
    second, _, below = started(2, stack=[first.id])

    found = beneath(workspace.store, [first.id], second.recipe["offset"])

    torch.testing.assert_close(product(found), product(own) + product(offset) + product(below))
    assert beneath(workspace.store, [], None) == {}


def test_a_merge_holds_the_offsets_of_what_it_merges_and_has_none(workspace, started):
    (first, *one), (second, *two) = started(1), started(2)

    merged = merge(workspace, [first.id, second.id], PluginChoice("cat"), "both", [1.0, -0.5])

    expected = sum(product(t) for t in one) - 0.5 * sum(product(t) for t in two)
    torch.testing.assert_close(product(workspace.store.tensors(merged)), expected)
    assert workspace.store.version(merged).recipe.get("offset") is None


def test_a_recipe_from_before_offsets_has_none(workspace, commit):
    version = commit(1)
    older = {name: value for name, value in version.recipe.items() if name != "offset"}
    own = workspace.store.tensors(version.id)
    older_version = workspace.store.version(workspace.store.commit(own, parents={}, recipe=older))

    assert product(effective(workspace.store, older_version)).equal(product(own))


def test_an_offset_is_no_version_to_use(workspace, started):
    version, _, _ = started(1)
    offset = workspace.store.version(version.recipe["offset"])

    with pytest.raises(NotAModel, match="took out of the base model, and no adapter by itself"):
        effective(workspace.store, replace(offset, recipe={**offset.recipe, "stack": []}))


def test_a_merge_tells_how_much_it_kept(workspace, commit):
    versions = [commit(seed) for seed in (1, 2)]
    refs = [version.id for version in versions]
    made = merge(workspace, refs, PluginChoice("magmax", {"rank": 1}), "best-of-both")
    told = workspace.store.version(made).metrics
    assert 0 < told["captured_energy"] == told["captured_energy/q"] < 1
    exact = merge(workspace, refs, PluginChoice("cat", {}), "sum")
    assert not workspace.store.version(exact).metrics
