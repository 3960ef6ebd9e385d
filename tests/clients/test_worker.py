"""The one door through which every backend runs an assignment."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import DataSpec, PluginChoice
from clients.evaluate import Evaluation, evaluate
from clients.starting import initial_tensors
from clients.trainer import train
from clients.wire import pack
from clients.worker import perform
from strategies.base import Broadcast, Update


@pytest.fixture(autouse=True)
def torch_as_before():
    """Undo the process-wide settings that a worker makes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_training_is_what_the_trainer_does(assign):
    assignment = assign(public=True)

    update = perform(assignment)

    assert isinstance(update, Update)
    assert pack(update) == pack(train(assignment))


def test_evaluation_is_what_the_evaluation_finds(assign):
    assignment = assign(action="evaluate")

    found = perform(assignment)

    assert isinstance(found, Evaluation)
    assert found == evaluate(assignment)


def test_first_tensors_need_no_data_and_follow_from_the_seed(assign):
    asked = assign(action="init", broadcast=Broadcast({}), data=DataSpec("none:"), seed=5)

    made = perform(asked)

    assert (made.round, made.base, made.num_examples) == (0, "", 0)
    expected = initial_tensors(asked)
    assert made.tensors.keys() == expected.keys()
    assert all(torch.equal(made.tensors[n], expected[n]) for n in expected)
    other = perform(replace(asked, seed=6)).tensors
    assert not torch.equal(other["head.weight"], expected["head.weight"])


def test_first_tensors_change_nothing(assign):
    made = perform(assign(action="init", broadcast=Broadcast({}))).tensors

    ups = [n for n in made if n.endswith("lora_B.weight")]
    assert ups
    assert all(not made[n].any() for n in ups)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_assignment_says_how_many_threads(assign, threads):
    perform(assign(action="evaluate", threads=threads))

    assert torch.get_num_threads() == threads


def test_a_worker_goes_from_one_adapter_to_another_and_back(assign):
    first = assign(public=True)
    other = assign(adapter=PluginChoice("lora", {"r": 4, "layers": [1]}), client="b", public=True)
    alone = pack(perform(first))

    perform(other)

    again = perform(replace(first, site=other.site + "-2"))  # a site without a stored update
    assert pack(again) == alone
