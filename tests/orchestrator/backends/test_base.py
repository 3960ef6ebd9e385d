"""What may leave a client when it fails."""

from dataclasses import replace

import pytest

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice, Privacy
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


def test_where_records_are_private_what_is_wrong_with_one_stays_at_the_client():
    private = replace(ASSIGNMENT, privacy=Privacy(1.0, 1.0, 0.1))

    found = failure(private, BadRecord("notes.jsonl:3: label 'flu' is not in the label set"))

    assert found.reason == "BadRecord at the client (its text stays there)"
    assert failure(private, BadOptions("rank 0")).reason == "rank 0"


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, OSError])
def test_the_text_of_any_other_error_stays_at_the_client(kind):
    found = failure(ASSIGNMENT, kind("patient 0815 has the flu"))

    assert found.reason == f"{kind.__name__} at the client (its text stays there)"
