"""Ray workers give what the inline backend gives, bit for bit, and survive their clients."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from clients.evaluate import Evaluation
from orchestrator import service
from orchestrator.backends import ray as backends
from orchestrator.backends.base import Failure, complete
from orchestrator.backends.ray import RayBackend, RayUnavailable
from orchestrator.plan import RoundInputs, plan_round
from storage.ledger import ClientRecord
from strategies.base import Broadcast, Update

pytestmark = [
    pytest.mark.ray,
    # Ray leaves its own processes to its node, and its sockets to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(120),
]

DP = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """Start one small Ray for all tests of this file."""
    backends._start_ray(None, 8)  # room for the workers of two backends and their successors
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trainers():
    """Two real workers."""
    backend = RayBackend(workers=2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def actors():
    """Two workers that do what a client's name says instead of training."""

    def act(assignment):
        tensors, place = assignment.broadcast.tensors, Path(assignment.site)
        if assignment.client.startswith("hang"):
            signal.pause()
        if assignment.client == "leak":
            raise KeyError("patient 0815")
        if assignment.client == "score":
            return Evaluation("score", assignment.round, 1, {"accuracy": 1.0})
        if assignment.client == "die" or (assignment.client == "die-once" and not _mark(place)):
            os.kill(os.getpid(), signal.SIGKILL)
        sent = {n: t + assignment.memory.get("add", 0) for n, t in tensors.items()}
        return Update(
            assignment.client, assignment.round, assignment.base, sent, 1, {"pid": os.getpid()}
        )

    def _mark(place):
        try:
            place.touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    backend = RayBackend(workers=2, perform=act)
    yield backend
    backend.close()


@pytest.fixture
def ask(make_plan, tensors, tmp_path):
    """Return a function that makes one round's assignments for clients of these names."""

    def make(*clients, sent=None, memory=None):
        inputs = RoundInputs(1, "f" * 64, {}, memory or {}, str(tmp_path / "mark"))
        plan = make_plan(clients=clients)
        broadcast = sent or Broadcast(tensors())
        return plan_round(plan, inputs, lambda client: broadcast, plan.participants)

    return make


def run(backend, assignments, deadline=60.0):
    began = []
    results = complete(backend, assignments, deadline, lambda a: began.append(a.client))
    return {r.client: r for r in results}, began


@pytest.mark.parametrize("privacy", [None, DP])
def test_a_run_on_ray_ends_at_the_inline_run_s_version(workspace, tiny, notes, trainers, privacy):
    for shift, name in enumerate("abc"):
        record = ClientRecord(name, notes(name, shift=shift), name, num_examples=12)
        workspace.ledger.add_client(record)
    config = tiny(rounds=2, strategy="fedsvd", privacy=privacy)

    inline = service.launch(workspace, config)

    assert service.launch(workspace, config, backend=trainers) == inline


def test_tensors_arrive_and_come_back_bit_for_bit(actors, ask):
    sent = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "odd": torch.randn(4, 3).T,
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor([2**40]),
        "none": torch.empty(0, 5),
    }

    results, _ = run(actors, ask("a", sent=Broadcast(sent)))

    back = results["a"].tensors
    assert all(torch.equal(back[n], sent[n]) and back[n].dtype == sent[n].dtype for n in sent)


def test_memory_and_broadcast_reach_every_client(actors, ask):
    memory = {"add": torch.tensor(2.0)}
    asked = ask(*"abcd", memory=memory)

    results, began = run(actors, asked)

    for assignment in asked:
        for name, tensor in assignment.broadcast.tensors.items():
            assert torch.equal(results[assignment.client].tensors[name], tensor + 2)
    assert sorted(began) == list("abcd")


def test_what_a_round_s_clients_share_is_put_into_the_store_once(actors, ask, monkeypatch):
    puts = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))

    run(actors, ask(*"abcdef", memory={"add": torch.tensor(1.0)}))

    assert len(puts) == 2  # the broadcast and the memory


def test_an_evaluation_comes_back_as_it_is(actors, ask):
    results, _ = run(actors, ask("score"))

    assert results["score"] == Evaluation("score", 1, 1, {"accuracy": 1.0})


def test_an_error_s_text_stays_at_the_client(actors, ask):
    results, _ = run(actors, ask("leak", "a"))

    assert results["leak"] == Failure("leak", 1, "KeyError at the client (its text stays there)")
    assert isinstance(results["a"], Update)


def test_a_client_whose_worker_is_killed_is_tried_again_elsewhere(actors, ask):
    results, began = run(actors, ask("a", "die-once"))

    assert isinstance(results["die-once"], Update)
    assert began.count("die-once") == 2
    assert results["a"].metrics.keys() == {"pid"}


def test_a_client_that_kills_its_workers_is_given_up_and_the_others_are_served(actors, ask):
    results, began = run(actors, ask("a", "b", "die"))

    assert results["die"] == Failure("die", 1, "the worker process died 2 times")
    assert began.count("die") == 2
    assert isinstance(results["a"], Update)
    assert isinstance(results["b"], Update)


def test_who_is_not_done_at_the_deadline_is_late_and_the_workers_go_on(actors, ask):
    run(actors, ask("a", "b"))  # both workers are up
    began = time.monotonic()

    results, _ = run(actors, ask("hang-1", "hang-2", "waits"), deadline=1.0)

    assert time.monotonic() - began < 5.0
    late = {c: Failure(c, 1, "missed the round's deadline") for c in ("hang-1", "hang-2", "waits")}
    assert results == late
    assert isinstance(run(actors, ask("a"))[0]["a"], Update)


def test_what_is_to_do_may_come_while_others_train(actors, ask):
    first, second = ask("a"), ask("b")
    done = []

    def coming():
        yield first[0]
        while not done:
            yield None
        yield second[0]

    for result in actors.run(coming(), lambda a: None):
        done.extend([] if result is None else [result.client])

    assert done == ["a", "b"]


def test_closing_gives_up_what_runs_and_the_backend_goes_on(actors, ask):
    results = actors.run(ask("a", "hang-1"), lambda a: None)
    while (first := next(results)) is None:
        pass
    assert first.client == "a"

    results.close()

    assert isinstance(run(actors, ask("b", "c"))[0]["b"], Update)


def test_a_cluster_that_is_not_there_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def unreachable(**options):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", unreachable)

    with pytest.raises(RayUnavailable, match=r"the Ray cluster at 10\.0\.0\.1:6379 cannot be join"):
        RayBackend(workers=1, address="10.0.0.1:6379")
    with pytest.raises(RayUnavailable, match=r"Ray cannot start .*; backend: inline needs no Ray"):
        RayBackend(workers=1)


def test_results_are_not_views_of_the_store(actors, ask):
    results, _ = run(actors, ask("a"))

    for tensor in results["a"].tensors.values():
        tensor.add_(1)  # the store's pages are read-only


def test_an_assignment_is_not_changed_by_being_sent(actors, ask):
    [asked] = ask("a")
    before = asked.digest()

    run(actors, [asked])

    assert asked.digest() == before == replace(asked).digest()
