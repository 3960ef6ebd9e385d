"""Where a run starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.assignment import DataSpec
from clients.starting import initial_tensors, initial_update
from clients.trainer import NothingToTrain


def test_first_tensors_follow_from_the_seed(assign):
    first, again, other = (initial_tensors(assign(seed=seed)) for seed in (1, 1, 2))

    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_first_update_reads_so_many_examples_as_are_asked_for(assign):
    asked = replace(assign(), action="init", num_examples=3)

    assert initial_update(asked).num_examples == 3


def test_a_start_from_data_without_an_example_is_refused(assign):
    asked = assign([{"text": "cat", "label": "cat"}])
    none = DataSpec(asked.data.uri, labels=("rank",))

    with pytest.raises(NothingToTrain, match="init_data holds no example for this task"):
        initial_update(replace(asked, action="init", data=none, num_examples=3))
