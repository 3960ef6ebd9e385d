"""A client that gives up ranks: when, what of it stays, and what it sends then."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients.assignment import PluginChoice, Privacy
from clients.pruning import NotPrivate, Ranks
from clients.site import Site
from clients.trainer import train
from strategies.base import Broadcast
from strategies.pruning import PruningRule, asking
from strategies.spends import ClientLevel
from strategies.tensors import ALL_TRAINED, lora_layers

RANK = 4
PRESSED = PruningRule(keep=0.75, weight=5.0, least=1)  # 4, 3, 2, 1, and no more


@pytest.fixture
def asked(assign):
    """Return a function that makes an assignment of rank 4, at whose start B is not zero."""

    def make(pruning=PRESSED, filled=True, **changes):
        adapter = PluginChoice("lora", {"r": RANK, "layers": [0]})
        plain = assign(adapter=adapter, optimizer=PluginChoice("sgd", {"lr": 0.01}), **changes)
        generator = torch.Generator().manual_seed(3)
        sent = {
            n: 0.1 * torch.randn(t.shape, generator=generator) if filled and ".lora_B." in n else t
            for n, t in sorted(plain.broadcast.tensors.items())
        }
        extra = asking(pruning) if pruning else {}
        return replace(plain, broadcast=Broadcast(sent, ALL_TRAINED, extra=extra))

    return make


def ranks(tensors):
    return {n.partition(".lora_")[0]: len(t) for n, t in tensors.items() if ".lora_A." in n}


def kept(assignment):
    state = Site(assignment.site).state(assignment.run, assignment.client, assignment.round)
    return {n.removeprefix("pruned/"): int(t) for n, t in state.items() if "pruned/" in n}


def test_ranks_that_are_pressed_below_where_they_began_are_given_up(asked):
    assignment = asked()
    update = train(assignment)
    assert set(ranks(update.tensors).values()) == {RANK - 1}
    assert all(t.shape[1] == RANK - 1 for n, t in update.tensors.items() if ".lora_B." in n)
    assert kept(assignment) == ranks(update.tensors)


def test_what_is_not_smaller_than_it_was_stays(asked):
    """While B is zero there is nothing that could become smaller."""
    assignment = asked(filled=False)
    assert set(ranks(train(assignment).tensors).values()) == {RANK}
    free = asked(PruningRule(0.75, 0.0, RANK))  # none may go
    assert set(ranks(train(replace(free, run="free")).tensors).values()) == {RANK}


def test_what_was_given_up_stays_given_up_whatever_is_sent(asked):
    first = asked()
    train(first)
    second = asked(PruningRule(0.75, 0.0, RANK - 1), round=2)
    update = train(second)
    assert set(ranks(update.tensors).values()) == {RANK - 1}
    assert kept(second) == kept(first)
    # as a client trains that was sent no more than its ranks
    sent = second.broadcast
    tensors = dict(sent.tensors)
    for name in lora_layers(sent.tensors):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a], tensors[b] = tensors[a][: RANK - 1], tensors[b][:, : RANK - 1]
    lower = replace(
        second,
        run="lower",
        adapter=PluginChoice("lora", {"r": RANK - 1, "layers": [0]}),
        broadcast=Broadcast(tensors, ALL_TRAINED),
    )
    torch.testing.assert_close(update.tensors, train(lower).tensors)


def test_ranks_go_down_round_by_round_to_the_least(asked):
    found = []
    for round_ in range(1, 5):
        update = train(asked(PRESSED._replace(least=2), round=round_))
        found.append(set(ranks(update.tensors).values()))
    assert found == [{3}, {2}, {2}, {2}]


def test_the_penalty_is_the_norms_of_the_last_ranks_and_lies_on_nothing_else(asked):
    assignment = asked(PruningRule(0.5, 2.0, 1))
    own = Ranks.of(assignment, {})
    params = {
        n: t.clone().requires_grad_()
        for n, t in assignment.broadcast.tensors.items()
        if ".lora_" in n
    }
    value = own.penalty(params)
    value.backward()
    expected = 2 * sum(
        float(f.b[:, 2:].norm() * f.a[2:].norm())
        for f in lora_layers(assignment.broadcast.tensors).values()
    )
    assert value.item() == pytest.approx(expected)
    for name, parameter in params.items():
        first, last = (
            (parameter.grad[:2], parameter.grad[2:])
            if ".lora_A." in name
            else (parameter.grad[:, :2], parameter.grad[:, 2:])
        )
        assert not first.any()
        assert last.all()


def test_a_retry_gives_up_the_same(asked):
    train(asked())
    second = asked(round=2)
    update = train(second)
    for stored in Path(second.site).rglob("update-*"):  # as if it had died before it was stored
        stored.unlink()
    again = train(second)
    assert all(torch.equal(t, again.tensors[n]) for n, t in update.tensors.items())


def test_a_private_assignment_that_gives_up_ranks_is_refused(asked):
    private = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, insecure_seed=1)
    with pytest.raises(NotPrivate, match="leave prune out, or run without privacy"):
        train(asked(privacy=private))
    with pytest.raises(NotPrivate):
        train(asked(central=ClientLevel(1.0, 1.0, 2)))
