"""What may leave a client when it fails."""

import pytest

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.data import BadRecord
from orchestrator.backends.base import Failure, failure
from strategies.base import Broadcast
from strategies.plugins import BadOptions

ASSIGNMENT = Assignment(
    action="train",
    run="run-1",
    client="clinic-7",
    round=3,
    base="",
    model=ModelSpec("m", "causal-lm"),
    adapter=PluginChoice("lora"),
    broadcast=Broadcast({}),
    data=DataSpec("jsonl:x"),
    optimizer=PluginChoice("sgd"),
    site="/site",
)


@pytest.mark.parametrize("kind", [BadRecord, BadOptions])
def test_the_message_of_an_expected_error_leaves_in_one_line(kind):
    found = failure(ASSIGNMENT, kind("line 3:\n  is wrong"))

    assert found == Failure("clinic-7", 3, "line 3: is wrong")


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, OSError])
def test_the_text_of_any_other_error_stays_at_the_client(kind):
    found = failure(ASSIGNMENT, kind("patient 0815 has the flu"))

    assert found.reason == f"{kind.__name__} at the client (its text stays there)"
