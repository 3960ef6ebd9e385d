"""What every backend owes the federation. A new one is an entry in conftest.py."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from clients.assignment import DataSpec
from clients.evaluate import Evaluation
from orchestrator.backends.base import Failure, complete
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update

TENSORS = {
    "half": torch.tensor([[0.1, -0.0], [float("inf"), float("nan")]], dtype=torch.bfloat16),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "scalar": torch.tensor(0.1, dtype=torch.float64),
    "count": torch.tensor([2**40]),
    "none": torch.empty(0, 5),
}
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def ask(make_plan, tensors):
    """Return a function that makes one round's assignments for clients of these names."""

    def make(*clients, sent=None, memory=None, underlay=None):
        inputs = RoundInputs(1, "f" * 64, underlay or {}, memory or {}, "")
        plan = make_plan(clients=clients)
        plan = replace(plan, model=replace(plan.model, hash="a" * 64))
        broadcast = Broadcast(sent or tensors())
        planned = plan_round(plan, inputs, lambda client: broadcast, plan.participants)
        # what a site calls its data, so that an assignment can go wherever one can
        asked = [replace(a, data=DataSpec("site:notes")) for a in planned]
        return [replace(a, action="evaluate") if a.client == "score" else a for a in asked]

    return make


@pytest.fixture
def run(backend):
    """Return a function that runs assignments and returns what came of each, and who began."""

    def whole(assignments, deadline=200.0):
        began = []
        found = complete(backend, assignments, deadline, lambda a: began.append(a.client))
        results = list(found)
        assert sorted(r.client for r in results) == sorted(a.client for a in assignments)
        return {r.client: r for r in results}, began

    return whole


def bits(tensors):
    """Return what of tensors must be the same when they have travelled."""
    return {
        name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def test_every_assignment_gets_one_result_and_is_begun(run, ask):
    results, began = run(ask("a", "b", "leak", "score", "c"))

    kinds = {client: type(result) for client, result in results.items()}
    assert kinds == {"a": Update, "b": Update, "c": Update, "leak": Failure, "score": Evaluation}
    assert set(began) == set(results)


def test_tensors_arrive_and_come_back_bit_for_bit(run, ask):
    results, _ = run(ask("a", sent=TENSORS, underlay=TENSORS))

    assert bits(results["a"].tensors) == bits(TENSORS)
    assert bits(results["a"].memory) == bits(TENSORS)


def test_an_update_comes_back_as_it_is(run, ask):
    results, _ = run(ask("a"))

    bare = replace(results["a"], tensors={}, memory={})
    assert bare == Update("a", 1, "f" * 64, {}, 3, {"loss": 0.1 + 0.2})


def test_memory_and_broadcast_reach_every_client(run, ask):
    asked = ask(*"abcd", memory={"add": torch.tensor(2.0)})

    results, _ = run(asked)

    for assignment in asked:
        for name, tensor in assignment.broadcast.tensors.items():
            assert torch.equal(results[assignment.client].tensors[name], tensor + 2)


def test_an_evaluation_comes_back_as_it_is(run, ask):
    results, _ = run(ask("score"))

    assert results["score"] == Evaluation("score", 1, 4, {"accuracy": 0.75}, {"cat": 0.5})


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ("leak", "KeyError at the client (its text stays there)"),
        ("bad", "rank must be at least 1, got 0"),
    ],
)
def test_a_client_s_error_is_its_failure_and_says_no_more_than_it_may(run, ask, client, reason):
    results, _ = run(ask(client, "a"))

    assert results[client] == Failure(client, 1, reason)
    assert isinstance(results["a"], Update)


def test_who_does_not_hold_what_was_left_out_says_so(run, ask):
    results, _ = run(ask("bare"))

    assert results["bare"].not_held


def test_who_has_not_begun_at_the_deadline_is_late(run, ask):
    results, began = run(ask("a", "b"), deadline=-1.0)

    late = "missed the round's deadline"
    assert results == {client: Failure(client, 1, late) for client in "ab"}
    assert began == []


def test_what_is_to_do_may_come_while_others_train(backend, ask):
    first, second = ask("a"), ask("b")
    done = []

    def coming():
        yield first[0]
        while not done:
            yield None
        yield second[0]

    for result in backend.run(coming(), lambda a: None):
        done.extend([] if result is None else [result.client])

    assert done == ["a", "b"]


def test_where_nothing_is_to_do_it_ticks(backend):
    def waiting():
        while True:
            yield None

    results = backend.run(waiting(), lambda a: None)

    assert list(islice(results, 3)) == [None] * 3
    results.close()


def test_closing_gives_up_what_is_left_and_the_backend_goes_on(backend, run, ask):
    results = backend.run(ask("a", "b", "c", "d"), lambda a: None)
    while (first := next(results)) is None:
        pass
    assert isinstance(first, Update)

    results.close()

    results, _ = run(ask("a", "score"))
    assert isinstance(results["a"], Update)


def test_an_assignment_is_not_changed_by_being_sent(run, ask):
    [asked] = ask("a", sent=TENSORS)
    before = asked.digest()

    run([asked])

    assert asked.digest() == before == replace(asked).digest()
