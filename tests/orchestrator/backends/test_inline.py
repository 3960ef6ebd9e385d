"""The reference backend: one client at a time, in order."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import Privacy
from clients.evaluate import Evaluation
from clients.starting import initial_tensors
from orchestrator.backends.base import Failure
from orchestrator.backends.inline import InlineBackend
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update


@pytest.fixture
def assignments(make_plan, tiny_encoder, notes, tmp_path):
    """Return a round's assignments of clients a, b and c on the tiny encoder."""
    plan = make_plan(steps=1, noise=None)
    plan = replace(plan, model=replace(plan.model, id=str(tiny_encoder), hash="", max_length=16))
    inputs = RoundInputs(1, "f" * 64, {}, {}, str(tmp_path / "sites"))
    planned = plan_round(plan, inputs, lambda client: Broadcast({}), plan.participants)
    sent = Broadcast(initial_tensors(planned[0]))
    return [replace(a, broadcast=sent, data=replace(a.data, uri=notes(a.client))) for a in planned]


def test_every_assignment_gets_its_result_in_order(assignments):
    began = []
    asked = [assignments[0], replace(assignments[1], action="evaluate"), assignments[2]]

    results = list(InlineBackend().run(asked, lambda a: began.append(a.client)))

    assert [type(r) for r in results] == [Update, Evaluation, Update]
    assert [r.client for r in results] == began == ["a", "b", "c"]


def test_a_failing_client_does_not_stop_the_others(assignments):
    broken = replace(assignments[1], data=replace(assignments[1].data, uri="jsonl:gone.jsonl"))
    hidden = replace(assignments[2], privacy=Privacy(1.0, -1.0, 0.1))

    first, second, third = InlineBackend().run([assignments[0], broken, hidden], lambda a: None)

    assert isinstance(first, Update)
    assert isinstance(second, Failure)
    assert "gone.jsonl" in second.reason
    assert third == Failure("c", 1, "ValueError at the client (its text stays there)")


def test_assignments_are_taken_one_at_a_time_and_a_none_is_a_tick(assignments):
    taken = []

    def coming():
        for assignment in (assignments[0], None, assignments[1]):
            taken.append(assignment and assignment.client)
            yield assignment

    results = InlineBackend().run(coming(), lambda a: None)

    assert next(results).client == "a"
    assert taken == ["a"]
    assert next(results) is None
    assert next(results).client == "b"
    assert taken == ["a", None, "b"]


@pytest.fixture(autouse=True)
def torch_as_before():
    """Undo the process-wide settings that a worker makes."""
    yield
    torch.use_deterministic_algorithms(False)
