"""A client may count by a number in an operator's label."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from clients.wire import unpack
from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.weighing import weighed, weighing_label
from storage.ledger import ClientRecord


@pytest.fixture
def labelled(workspace, notes):
    """Return a workspace with two clients of whom one counts three times as much."""
    for shift, (name, label) in enumerate((("a", "3"), ("b", "1"))):
        record = ClientRecord(
            name, notes(name, shift=shift), name, num_examples=12, labels={"beds": label}
        )
        workspace.ledger.add_client(record)
    return workspace


def test_the_label_is_found_in_the_strategy_or_in_one_inside_it():
    inner = {"name": "fedavg", "weighting": "label:beds"}
    assert weighing_label({"weighting": "label:beds"}) == "beds"
    assert weighing_label({"lr": 1.0, "inner": inner}) == "beds"
    assert weighing_label({"weighting": "examples", "inner": {"name": "fedsvd"}}) is None


def test_a_run_weighs_its_clients_by_the_label_and_is_replayed_so(labelled, tiny, kept):
    config = tiny(strategy={"name": "fedavg", "weighting": "label:beds"}, retention="all")
    version = service.launch(labelled, config)
    store = labelled.store
    leaves = store.version(version).recipe["updates"]
    sent = [unpack(store.updates.read(digest)) for digest in kept(labelled).values()]
    heads = [update.tensors["head.bias"] for update in sent]

    assert [leaf["declared"] for leaf in leaves] == [3.0, 1.0]
    wanted = (3 * heads[0] + heads[1]) / 4
    assert_close(store.tensors(version)["head.bias"], wanted)
    assert not torch.allclose(wanted, (heads[0] + heads[1]) / 2)
    assert [one.outcome for one in service.replay(labelled, version)] == ["same"]


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ({}, "a has no such label; register it with --label beds=NUMBER"),
        ({"beds": "many"}, "a has beds=many"),
        ({"beds": "0"}, "a has beds=0"),
        ({"beds": "inf"}, "a has beds=inf"),
    ],
)
def test_a_client_without_such_a_number_is_refused(make_plan, labels, why):
    who = replace(make_plan().participants[0], labels=labels)
    with pytest.raises(BadConfig, match=why):
        weighed(who, "beds")
    assert weighed(who, None) is who


def test_a_run_that_weighs_by_a_label_that_nobody_has_is_not_planned(labelled, tiny):
    with pytest.raises(BadConfig, match="a has no such label"):
        plan_of(
            tiny(strategy={"name": "fedavg", "weighting": "label:wards"}),
            labelled.store,
            labelled.ledger,
        )


def test_a_weighting_of_no_known_form_is_refused(tiny):
    with pytest.raises(BadConfig, match="weighting must be examples, uniform or label:NAME, got"):
        tiny(strategy={"name": "fedavg", "weighting": "sizes"})
