import re

import pytest
import torch

from strategies.base import ClientSpec
from strategies.lora_a2 import LoRAA2
from strategies.rolora import RoLoRA
from strategies.selection import Budget, budget_of, chosen, compact, expanded

RANK, LAYERS = 4, 2


def trained(sent, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + torch.randn(t.shape, generator=generator).to(t.dtype)
        for n, t in sorted(sent.tensors.items())
        if re.fullmatch(sent.trainable, n)
    }


def played(strategy, state, make_update, ranks, rounds=3):
    """Play rounds in which two clients choose ``ranks`` ranks; return the states."""
    states = []
    for round_ in range(rounds):
        sent, updates = strategy.broadcast(state, ClientSpec("a")), []
        for index, client in enumerate("ab"):
            values = trained(sent, 2 * round_ + index)
            picked = chosen(sent.tensors, values, ranks)
            whole = expanded(compact(values, picked), sent.tensors)
            updates.append(make_update(whole, client))
        state = strategy.aggregate(state, updates)
        states.append(state)
    return states


def test_with_all_ranks_chosen_it_is_rolora_bit_for_bit(make_adapter, make_update):
    ours, plain = LoRAA2(budget=RANK), RoLoRA()
    start, begun = plain.init(make_adapter()), ours.init(make_adapter()).adapter
    assert all(torch.equal(t, start.adapter[n]) for n, t in begun.items())
    for one, other in zip(
        *(played(s, start, make_update, RANK * LAYERS) for s in (ours, plain)), strict=True
    ):
        for left, right in ((one.adapter, other.adapter), (one.auxiliary, other.auxiliary)):
            assert left.keys() == right.keys()
            assert all(torch.equal(t, right[n]) for n, t in left.items())
        sent = [s.broadcast(x, ClientSpec("a")) for s, x in ((ours, one), (plain, other))]
        assert sent[0].trainable == sent[1].trainable


def test_ranks_that_nobody_chose_stay_bit_for_bit_and_the_others_move(make_adapter, make_update):
    strategy = LoRAA2(budget=1)
    state = strategy.init(make_adapter())
    sent = strategy.broadcast(state, ClientSpec("a"))
    picks, updates = [], []
    for seed, client in enumerate("ab"):
        values = trained(sent, seed)
        picks.append(chosen(sent.tensors, values, 2))
        updates.append(make_update(expanded(compact(values, picks[-1]), sent.tensors), client))
    after = strategy.aggregate(state, updates).adapter
    for name, mine in picks[0].items():
        kept = ~(mine | picks[1][name])
        assert torch.equal(after[name][:, kept], state.adapter[name][:, kept])
        moved = (after[name] - state.adapter[name])[:, ~kept]
        assert moved.norm(dim=0).all()


def test_who_left_a_rank_out_counts_as_not_having_moved_it(make_adapter, make_update):
    """The server's step is ``B += sum p_k dB_k M_k``, divided by all."""
    strategy = LoRAA2(budget=1)
    state = strategy.init(make_adapter(dtype=torch.float64))
    sent = strategy.broadcast(state, ClientSpec("a"))
    name, values = "encoder.query.lora_B.weight", trained(sent, 1)
    still = {n: sent.tensors[n] for n in values}
    updates = [make_update(values, "a", 1), make_update(still, "b", 3)]
    after = strategy.aggregate(state, updates).adapter[name]
    expected = sent.tensors[name] + (values[name] - sent.tensors[name]) / 4
    torch.testing.assert_close(after, expected)


def test_a_budget_is_a_number_of_ranks_a_layer_and_a_client_may_have_its_own(make_adapter):
    strategy = LoRAA2(budget=2, label="ranks", probe=0.5)
    state = strategy.init(make_adapter())
    found = {
        value: budget_of(strategy.broadcast(state, ClientSpec("a", labels=labels)).extra)
        for value, labels in {"none": {}, "3": {"ranks": "3"}}.items()
    }
    assert found == {"none": Budget(2 * LAYERS, 0.5), "3": Budget(3 * LAYERS, 0.5)}


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "²"])
def test_a_label_that_is_no_budget_is_refused(text, make_adapter):
    strategy = LoRAA2(label="ranks")
    state = strategy.init(make_adapter())
    with pytest.raises(ValueError, match=f"phone has ranks={re.escape(text)}, and a budget is a"):
        strategy.broadcast(state, ClientSpec("phone", labels={"ranks": text}))
