"""Heads that grow: old rows stay, and a new one depends on nothing but its label and the seed."""

import pytest
import torch

from orchestrator.growing import grown, grown_memory, is_beginning

OLD, NEW = ("a", "b", "c", "d"), ("a", "b", "c", "d", "e", "f")


@pytest.fixture
def head(tensors):
    return tensors(labels=4)


def test_old_rows_stay_bit_for_bit_and_so_does_the_adapter(head):
    after = grown(head, OLD, NEW, seed=0)
    assert after["head.weight"].shape == (6, 5)
    for name, tensor in head.items():
        assert torch.equal(after[name][:4] if name.startswith("head.") else after[name], tensor)
    assert torch.equal(after["head.bias"][4:], torch.zeros(2))


def test_labels_that_come_together_or_one_by_one_begin_alike(head):
    together = grown(head, OLD, NEW, seed=3)
    one_by_one = grown(grown(head, OLD, NEW[:5], seed=3), NEW[:5], NEW, seed=3)
    assert all(torch.equal(together[name], one_by_one[name]) for name in together)


def test_rows_differ_by_label_and_by_seed(head):
    rows = grown(head, OLD, NEW, seed=3)["head.weight"][4:]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows, grown(head, OLD, NEW, seed=4)["head.weight"][4:])


def test_new_rows_are_spread_as_those_of_a_new_head():
    wide = {"head.weight": torch.zeros(1, 20_000), "head.bias": torch.zeros(1)}
    row = grown(wide, ("a",), ("a", "b"), seed=0)["head.weight"][1]
    assert float(row.std()) == pytest.approx(0.02, rel=0.05)


def test_what_a_memory_keeps_of_the_head_grows_with_zeros():
    memory = {
        "ewc/fisher/head.weight": torch.ones(4, 5),
        "ewc/fisher/head.bias": torch.ones(4),
        "o-lora/q.subspace": torch.ones(4, 5),
    }
    after = grown_memory(memory, OLD, NEW)
    assert after["ewc/fisher/head.weight"].sum(dim=1).tolist() == [5, 5, 5, 5, 0, 0]
    assert after["ewc/fisher/head.bias"].tolist() == [1, 1, 1, 1, 0, 0]
    assert after["o-lora/q.subspace"] is memory["o-lora/q.subspace"]


def test_a_label_set_that_stays_changes_nothing(head):
    assert grown(head, OLD, OLD, seed=0) is head
    assert grown_memory(head, OLD, OLD) is head
    assert "head.weight" not in grown({}, OLD, NEW, seed=0)


def test_only_a_label_set_that_begins_with_the_old_may_follow():
    assert is_beginning(OLD, NEW)
    assert is_beginning(OLD, OLD)
    assert not is_beginning(NEW, OLD)
    assert not is_beginning(("b", "a"), OLD)
