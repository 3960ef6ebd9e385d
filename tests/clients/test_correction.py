"""What a client adds to its gradients, and what it keeps, where a round corrects them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from clients.assignment import PluginChoice, Privacy
from clients.correction import NoGradientEstimate
from clients.site import Site
from clients.trainer import train
from strategies.base import CORRECTION, corrections
from strategies.tensors import B_AND_HEAD

QUIET = Privacy(noise_multiplier=1e-9, max_grad_norm=1e6, sample_rate=1.0)


@pytest.fixture
def corrected(assign):
    """Return a function that makes an assignment with the server's variate, all of one value."""

    def make(value=0.0, **changes):
        plain = assign(**changes)
        sent = plain.broadcast
        extra = {
            CORRECTION + n: torch.full_like(t, value)
            for n, t in sent.tensors.items()
            if ".lora_B." in n or n.startswith("head.")
        }
        return replace(plain, broadcast=replace(sent, trainable=B_AND_HEAD, extra=extra))

    return make


def kept(assignment, round_=1):
    return corrections(Site(assignment.site).state(assignment.run, assignment.client, round_))


def plain(assignment, **changes):
    sent = replace(assignment.broadcast, extra={})
    return replace(assignment, broadcast=sent, run="plain", **changes)


def test_without_variates_it_trains_as_ever_and_keeps_what_it_moved(corrected):
    assignment = corrected()
    update, usual = train(assignment), train(plain(assignment))
    assert all(torch.equal(t, usual.tensors[n]) for n, t in update.tensors.items())
    sent = assignment.broadcast.tensors
    for name, own in kept(assignment).items():
        assert_close(own, sent[name] - update.tensors[name])
    assert kept(assignment).keys() == update.tensors.keys()


@pytest.mark.parametrize("privacy", [None, QUIET])
def test_a_step_is_corrected_by_the_difference_of_the_variates(corrected, privacy):
    """In one step, ``lr (c - c_k)`` is ``C - C_k``."""
    first = corrected(0.0, steps=1, batch_size=100, privacy=privacy)
    train(first)
    own = kept(first)
    second = corrected(0.25, steps=1, batch_size=100, privacy=privacy, round=2)
    update, usual = train(second), train(plain(second))
    for name, tensor in update.tensors.items():
        assert_close(usual.tensors[name] - tensor, 0.25 - own[name], rtol=1e-4, atol=1e-5)
        moved = second.broadcast.tensors[name] - tensor
        assert_close(kept(second, 2)[name], own[name] - 0.25 + moved)


def test_a_round_reads_the_one_before_and_a_retry_writes_the_same(corrected):
    train(corrected())
    second = corrected(0.1, round=2)
    before, after = kept(second, 1), (train(second), kept(second, 2))[1]
    for stored in Path(second.site).rglob("update-*"):  # as if it had died before it was stored
        stored.unlink()
    train(second)
    assert all(torch.equal(t, after[n]) for n, t in kept(second, 2).items())
    assert all(torch.equal(t, before[n]) for n, t in kept(second, 1).items())


def test_a_frozen_head_has_no_variate(corrected):
    assignment = corrected(head="freeze")
    train(assignment)
    assert kept(assignment)
    assert not any(name.startswith("head.") for name in kept(assignment))


def test_personal_tensors_and_variates_are_kept_side_by_side(corrected):
    assignment = corrected()
    sent = replace(assignment.broadcast, personal=r".*\.lora_A\..*", trainable=r"(?!.*scaling).*")
    train(replace(assignment, broadcast=sent))
    state = Site(assignment.site).state("run-1", "clinic-7", 1)
    assert {n for n in state if not n.startswith(CORRECTION)} == {
        n for n in sent.tensors if ".lora_A." in n
    }
    update = train(replace(assignment, broadcast=sent, round=2))
    assert update.tensors.keys() == kept(assignment).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": PluginChoice("adamw")},
        {"optimizer": PluginChoice("sgd", {"momentum": 0.9})},
        {"optimizer": PluginChoice("sgd", {"weight_decay": 0.1})},
        {"steps": None},
    ],
)
def test_where_nothing_can_be_learnt_from_the_steps_it_is_refused(corrected, changes):
    with pytest.raises(NoGradientEstimate, match="use optimizer sgd without momentum"):
        train(corrected(**changes))
