"""What kept examples add to the loss, by hand."""

from __future__ import annotations

import pytest
import torch

from clients.regularizers import REGULARIZERS
from clients.regularizers.der_plus_plus import DERPlusPlus
from clients.regularizers.replay import Replay
from strategies.plugins import BadOptions

LOSSES = torch.tensor([1.0, 3.0])
NOW = torch.tensor([[1.0, 2.0, 9.0], [0.0, 1.0, 2.0]])
THEN = torch.tensor([[0.0, 0.0, float("nan")], [3.0, 1.0, 2.0]])


def test_replay_adds_the_weighted_cross_entropy():
    found = Replay(weight=0.5).rehearsal_loss(LOSSES, NOW, torch.empty(2, 0))
    assert found.tolist() == [0.5, 1.5]


def test_it_adds_the_squared_distance_of_the_logits_and_the_cross_entropy():
    found = DERPlusPlus(alpha=2.0, beta=0.5).rehearsal_loss(LOSSES, NOW, THEN)
    assert found.tolist() == [2.0 * (1 + 4) / 2 + 0.5, 2.0 * 9 / 3 + 1.5]


def test_labels_that_had_no_part_in_the_task_get_no_gradient():
    now = NOW.clone().requires_grad_()
    DERPlusPlus(beta=0.0).rehearsal_loss(LOSSES, now, THEN).sum().backward()
    assert now.grad.isfinite().all()
    assert now.grad[0, 2] == 0
    assert now.grad[0, 0] != 0


def test_an_example_that_was_kept_without_logits_counts_by_its_label_alone():
    none = torch.full((2, 3), float("nan"))
    assert DERPlusPlus(beta=0.5).rehearsal_loss(LOSSES, NOW, none).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("name", "options"),
    [("replay", {"size": 0}), ("replay", {"weight": 0.0}), ("der-plus-plus", {"alpha": 0.0})],
)
def test_options_with_which_it_would_do_nothing_are_refused(name, options):
    with pytest.raises(BadOptions, match=f"{next(iter(options))} must be"):
        REGULARIZERS.get(name).build(**options)
