"""What is committed to a store that writes nothing is found there, and nowhere else."""

import pytest
import torch

from storage.refs import UnknownVersion
from storage.store import AdapterStore
from storage.unwritten import UnwrittenStore


def test_what_is_held_is_what_would_be_committed(engine, blobs):
    written = AdapterStore(engine, blobs)
    there = written.commit({"a": torch.ones(2)}, parents={}, recipe={"kind": "start"})
    store = UnwrittenStore(engine, blobs)
    given = {
        "tensors": {"a": torch.zeros(2)},
        "auxiliary": {"b": torch.ones(1)},
        "memory": {"c": torch.ones(3)},
        "parents": {there: "merge"},
        "recipe": {"kind": "merge"},
        "metrics": {"energy": 0.5},
    }
    held = store.commit(**given)
    store.record_metrics(held, {"loss": 2.0})
    mine = store.version(held)
    with pytest.raises(UnknownVersion):
        written.version(held)
    assert torch.equal(store.tensors(held)["a"], torch.zeros(2))

    assert written.commit(**given) == held
    theirs = written.version(held)
    assert (mine.parents, mine.recipe) == (theirs.parents, theirs.recipe)
    assert mine.metrics == {"energy": 0.5, "loss": 2.0}
    for part in ("tensors", "auxiliary", "memory"):
        one, other = getattr(store, part)(held), getattr(written, part)(held)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_there_is_read_and_measured_and_no_name_is_given(engine, blobs):
    written = AdapterStore(engine, blobs)
    there = written.commit({"a": torch.ones(2)}, parents={}, recipe={"kind": "start"})
    store = UnwrittenStore(engine, blobs)
    store.record_metrics(there, {"loss": 1.0})
    assert store.name("bot", there[:8]) == there
    assert torch.equal(store.tensors(there[:8])["a"], torch.ones(2))
    assert written.version(there).metrics == {"loss": 1.0}
    assert written.names() == []


def test_what_a_basis_has_is_loaded_with_what_lies_in_it(engine, blobs):
    written = AdapterStore(engine, blobs)
    basis = written.commit(
        {"a": torch.ones(2), "b": torch.ones(3)}, parents={}, recipe={"kind": "basis"}
    )
    given = {"parents": {basis: "basis"}, "recipe": {"kind": "merge"}}
    for store in (UnwrittenStore(engine, blobs), written):
        core = store.commit({"b": torch.zeros(3), "c": torch.ones(1)}, **given)
        found = store.tensors(core)
        assert list(found) == ["a", "b", "c"]
        assert torch.equal(found["a"], torch.ones(2))
        assert torch.equal(found["b"], torch.zeros(3))
