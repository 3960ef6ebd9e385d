"""A batch as its examples, whatever it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.samples import singles
from clients.tokens import Batch

IDS = torch.arange(6).reshape(3, 2)


def test_what_a_teacher_says_of_an_example_goes_with_it():
    taught = {"lwf/outputs": torch.arange(3.0)[:, None]}
    batch = Batch(IDS, torch.ones_like(IDS), torch.arange(3), taught)
    for index, one in enumerate(singles(batch)):
        assert one.input_ids.tolist() == [IDS[index].tolist()]
        assert one.taught["lwf/outputs"].tolist() == [[float(index)]]
        assert len(one) == 1


def test_a_batch_that_nobody_taught_is_split_too():
    batch = Batch(IDS, torch.ones_like(IDS), torch.arange(3))
    assert [one.labels.tolist() for one in singles(batch)] == [[0], [1], [2]]
    assert all(one.taught == {} for one in singles(batch))


def test_parts_of_other_lengths_are_no_batch():
    batch = Batch(IDS, torch.ones_like(IDS), torch.arange(3))
    with pytest.raises(ValueError, match="is shorter"):
        singles(replace(batch, labels=torch.arange(2)))
