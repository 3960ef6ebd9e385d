"""A client with a budget of ranks: what it trains after the probe, and what it sends."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import Privacy
from clients.pace import GivenUp
from clients.selection import NotPrivate
from clients.trainer import train
from clients.wire import pack
from strategies.selection import Budget, asking, chosen, expanded
from strategies.spends import ClientLevel
from strategies.tensors import B_AND_HEAD

STEPS, ALL = 4, 4  # two layers of rank 2


@pytest.fixture
def budgeted(assign):
    """Return a function that makes an assignment that trains B, with a budget of ranks."""

    def make(ranks, probe=0.5, **changes):
        plain = assign(**{"steps": STEPS, "public": True, **changes})
        extra = asking(Budget(ranks, probe)) if ranks else {}
        sent = replace(plain.broadcast, trainable=B_AND_HEAD, extra=extra)
        return replace(plain, broadcast=sent, site=f"{plain.site}-{ranks}-{probe}")

    return make


def whole(update, assignment):
    return expanded(update.tensors, assignment.broadcast.tensors)


def test_it_sends_as_many_ranks_as_it_may_those_that_the_probe_moved_most(budgeted):
    assignment = budgeted(3)
    sent = assignment.broadcast.tensors
    probe = train(budgeted(0, steps=STEPS // 2)).tensors
    expected = chosen(sent, {n: t for n, t in probe.items() if ".lora_B." in n}, 3)

    update = train(assignment)
    ranks = {n: t for n, t in update.tensors.items() if n.endswith(":ranks")}
    assert sum(len(t) for t in ranks.values()) == 3
    for name, mask in expected.items():
        assert ranks[f"{name}:ranks"].tolist() == mask.nonzero().flatten().tolist()
        assert update.tensors[name].shape == (sent[name].shape[0], int(mask.sum()))
        there = whole(update, assignment)[name]
        assert torch.equal(there[:, ~mask], sent[name][:, ~mask])
        assert not mask.any() or not torch.equal(there[:, mask], probe[name][:, mask])  # it went on


def test_with_a_probe_of_all_steps_it_sends_what_it_would_have_sent_of_its_ranks(budgeted):
    plain, update = train(budgeted(0)).tensors, train(assignment := budgeted(3, 1.0))
    sent = assignment.broadcast.tensors
    mask = chosen(sent, {n: t for n, t in plain.items() if ".lora_B." in n}, 3)
    for name, there in whole(update, assignment).items():
        if name in mask:
            assert torch.equal(there, torch.where(mask[name], plain[name], sent[name]))
        else:
            assert torch.equal(there, plain[name])


def test_a_budget_of_all_ranks_changes_no_byte(budgeted):
    assert pack(train(budgeted(ALL))) == pack(train(budgeted(0)))


def test_stopped_at_any_step_it_ends_with_the_same_bytes(budgeted):
    expected = pack(train(budgeted(3)))
    for at in range(1, STEPS):
        assignment = budgeted(3, client="clinic-7")
        assignment = replace(assignment, site=f"{assignment.site}-{at}")

        def stop(step, steps, at=at):
            if step == at:
                raise GivenUp("the worker is gone")

        with pytest.raises(GivenUp):
            train(assignment, stop, checkpoint_s=0)
        assert pack(train(assignment, checkpoint_s=0)) == expected


def test_a_private_assignment_with_a_budget_is_refused(budgeted):
    private = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, insecure_seed=1)
    with pytest.raises(NotPrivate, match="use rolora, or run without privacy"):
        train(budgeted(3, privacy=private))
    with pytest.raises(NotPrivate):
        train(budgeted(3, central=ClientLevel(1.0, 1.0, 2)))
