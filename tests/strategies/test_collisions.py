import pytest
import torch

from strategies import collisions
from strategies.collisions import collision_rate
from strategies.terms import BadMerge


def outer(b, a, scaling=1.0):
    """An adapter of rank 1 that changes the entries where both b and a are not 0."""
    return {
        "q.lora_A.weight": torch.tensor([a]),
        "q.lora_B.weight": torch.tensor([b]).T.contiguous(),
        "q.scaling": torch.tensor(scaling),
    }


def test_it_counts_the_entries_that_both_change():
    one, two = outer([1.0, 1.0], [1.0, 1.0, 0.0]), outer([1.0, 0.0], [0.0, 5.0, 5.0])
    found = collision_rate([one, two])
    assert found == {"collision_rate": 1 / 6, "collision_rate/q": 1 / 6}


def test_products_on_disjoint_rows_do_not_collide_and_equal_ones_always(make_adapter):
    one, two = outer([1.0, 0.0], [1.0, 2.0]), outer([0.0, 1.0], [1.0, 2.0])
    assert collision_rate([one, two])["collision_rate"] == 0
    whole = make_adapter(head=False)
    assert collision_rate([whole, whole])["collision_rate"] == 1


def test_a_threshold_leaves_small_changes_out_whatever_the_scale():
    one, two = outer([1.0, 0.01], [1.0, 1.0]), outer([1.0, 1.0], [1.0, 1.0], scaling=1e-3)
    assert collision_rate([one, two])["collision_rate"] == 1
    assert collision_rate([one, two], threshold=0.1)["collision_rate"] == 0.5


def test_a_layer_that_one_has_alone_counts_as_free():
    one, two = outer([1.0], [1.0]), outer([1.0], [1.0])
    other = {n.replace("q.", "v."): t for n, t in outer([1.0], [1.0, 1.0, 1.0]).items()}
    assert collision_rate([{**one, **other}, two])["collision_rate"] == 1 / 4


def test_blocks_of_rows_count_as_the_whole_does(monkeypatch, make_adapter):
    adapters = [make_adapter(seed, head=False) for seed in (1, 2)]
    whole = collision_rate(adapters, threshold=0.5)
    monkeypatch.setattr(collisions, "_ENTRIES", 1)
    assert collision_rate(adapters, threshold=0.5) == whole
    assert 0 < whole["collision_rate"] < 1


def test_adapters_of_different_base_models_are_refused():
    with pytest.raises(BadMerge, match="different base models"):
        collision_rate([outer([1.0], [1.0]), outer([1.0], [1.0, 2.0])])
