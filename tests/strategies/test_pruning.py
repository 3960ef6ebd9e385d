"""The words by which clients are asked to give up ranks, and what is left of a layer then."""

import pytest
import torch

from strategies.base import ClientSpec
from strategies.hetlora import HetLoRA
from strategies.pruning import PruningRule, asking, cut, pruning_of, ranks_in

A, B = "encoder.query.lora_A.weight", "encoder.query.lora_B.weight"


def test_a_layer_goes_down_by_its_share_and_not_below_the_least():
    found = {rank: PruningRule(0.99, 0.0, 4).below(rank) for rank in (2, 4, 5, 100)}
    assert found == {2: 2, 4: 4, 5: 4, 100: 99}


def test_what_is_left_are_the_first_ranks_of_the_layers_that_are_named(make_adapter):
    adapter = make_adapter()
    found = cut(adapter, {"encoder.query": 3})
    assert found.keys() == adapter.keys()
    assert torch.equal(found[A], adapter[A][:3])
    assert torch.equal(found[B], adapter[B][:, :3])
    assert all(found[n] is t for n, t in adapter.items() if n not in (A, B))
    assert ranks_in(found, adapter) == {"encoder.query": 3}


@pytest.mark.parametrize(
    ("a", "b"), [((3, 12), (7, 2)), ((0, 12), (7, 0)), ((4, 12), (7, 4)), ((3,), (7, 3))]
)
def test_ranks_that_do_not_fit_each_other_are_not_taken_for_ranks(make_adapter, a, b):
    adapter = make_adapter()
    assert ranks_in({**adapter, A: torch.zeros(a), B: torch.zeros(b)}, adapter) == {}


def test_hetlora_asks_for_it_where_it_is_told_to_and_takes_what_comes(make_adapter, make_update):
    strategy = HetLoRA(prune=0.5, penalty=0.1, least_rank=2, masked=True, weighting="uniform")
    state = strategy.init(make_adapter(dtype=torch.float64))
    sent = strategy.broadcast(state, ClientSpec("a"))
    assert pruning_of(sent.extra) == PruningRule(0.5, 0.1, 2)
    assert pruning_of(HetLoRA().broadcast(state, ClientSpec("a")).extra) is None
    assert {"private", "additive"}.isdisjoint(strategy.capabilities)
    assert all(asking(PruningRule(0.5, 0.1, 2))[n] is t for n, t in sent.extra.items())

    trained = {n: t + 1 for n, t in sent.tensors.items() if not n.endswith(".scaling")}
    lower = cut({**state.adapter, **trained}, {"encoder.query": 2})
    updates = [make_update({n: lower[n] for n in trained}, "a"), make_update(trained, "b")]
    after = strategy.aggregate(state, updates).adapter
    torch.testing.assert_close(after[B], state.adapter[B] + 1)
    assert after[B].shape == state.adapter[B].shape
