"""Ray workers give what the inline backend gives, bit for bit, and survive their clients."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from clients.evaluate import Evaluation
from orchestrator import service
from orchestrator.backends import ray_cluster, ray_pool, ray_worker
from orchestrator.backends.base import Failure, complete
from orchestrator.backends.ray import RayBackend, RayUnavailable
from orchestrator.backends.ray_cluster import start_ray
from orchestrator.backends.ray_payload import Once
from orchestrator.backends.ray_pool import Seat
from orchestrator.plan import RoundInputs, plan_round
from storage.ledger import ClientRecord
from strategies.base import Broadcast, Update

pytestmark = [
    pytest.mark.ray,
    # Ray leaves its own processes to its node, and its sockets to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

DP = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """Start one small Ray for all tests of this file."""
    start_ray(8)  # room for the workers of some backends and their successors
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trainers():
    """Two real workers."""
    backend = RayBackend(workers=2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def behave():
    """How a client behaves, by its name: functions of a fixture travel to workers as they are."""
    hoard = []

    def mark(place):
        """Return whether somebody was here before."""
        try:
            place.touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    def behave(kind, tag, place, stepped):
        if kind == "hang" and not mark(place.with_name(f"{place.name}-{tag}")):
            signal.pause()
        elif kind in ("slow", "brief"):
            steps = {"slow": 10_000, "brief": 40}[kind]
            for step in range(steps):
                stepped(step, steps)
                time.sleep(0.05)
        elif kind == "hoard":
            hoard.append(b"x" * 64_000_000)
        elif kind == "leak":
            raise KeyError("patient 0815")
        elif kind == "die" and (tag != "once" or not mark(place)):
            os.kill(os.getpid(), signal.SIGKILL)

    return behave


@pytest.fixture(scope="module")
def act(behave):
    """What a worker does: what the client's name says, instead of training."""

    def act(assignment, stepped):
        kind, _, tag = assignment.client.partition("-")
        behave(kind, tag, Path(assignment.site), stepped)
        if kind == "score":
            return Evaluation("score", assignment.round, 1, {"accuracy": 1.0})
        add = assignment.memory.get("add", 0)
        sent = {n: t + add for n, t in assignment.broadcast.tensors.items()}
        facts = {"pid": os.getpid()}
        return Update(assignment.client, assignment.round, assignment.base, sent, 1, facts)

    return act


@pytest.fixture(scope="module")
def actors(act):
    """Two such workers, which are patient with a silent client and not with one given up."""
    backend = RayBackend(workers=2, perform=act, grace_s=0.5)
    yield backend
    backend.close()


@pytest.fixture
def alone(act):
    """Return a function that makes a backend of one such worker, with options."""
    made = []

    def make(**options):
        made.append(RayBackend(workers=1, perform=act, **options))
        return made[-1]

    yield make
    for backend in made:
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


@pytest.mark.parametrize(("privacy", "downlink"), [(None, "whole"), (DP, "whole"), (None, "held")])
def test_a_run_on_ray_ends_at_the_inline_run_s_version(
    workspace, tiny, notes, trainers, privacy, downlink
):
    for shift, name in enumerate("abc"):
        record = ClientRecord(name, notes(name, shift=shift), name, num_examples=12)
        workspace.ledger.add_client(record)
    config = tiny(rounds=2, strategy="fedsvd", privacy=privacy)

    inline = service.launch(workspace, config)

    travelling = config.model_copy(update={"downlink": downlink})
    assert service.launch(workspace, travelling, backend=trainers) == inline


def test_what_clients_read_on_ray_is_remembered_as_inline(workspace, tiny, notes, trainers):
    for shift, name in enumerate("abc"):
        record = ClientRecord(name, notes(name, shift=shift), name, num_examples=12)
        workspace.ledger.add_client(record)
    config = tiny(strategy="fedavg", regularizers=["ewc", "si"])
    inline = service.launch(workspace, config)
    assert workspace.store.memory(inline)
    assert service.launch(workspace, config, backend=trainers) == inline


def test_what_a_round_s_clients_share_is_put_into_the_store_once(actors, ask, monkeypatch):
    puts = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))

    run(actors, ask(*"abcdef", memory={"add": torch.tensor(1.0)}))

    assert len(puts) == 2  # the broadcast and the memory


def test_only_what_two_rounds_sent_is_remembered(monkeypatch):
    puts = []
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or len(puts))
    underlay, sent = {"u": torch.ones(1)}, [{"a": torch.full((1,), i)} for i in range(9)]
    once = Once()

    for round_, tensors in enumerate(sent):
        assert [once(underlay, round_), once(tensors, round_), once(tensors, round_)][0] == 1
    assert len(puts) == 10  # each of these once
    assert [once(tensors, 8) for tensors in sent[-2:]] == [9, 10]
    assert once(sent[0], 0) == 11  # a client that was late is tried again
    assert len(once._known) <= 4


def test_a_client_whose_worker_is_killed_is_tried_again_elsewhere(actors, ask):
    results, began = run(actors, ask("a", "die-once"))

    assert isinstance(results["die-once"], Update)
    assert began.count("die-once") == 2
    assert results["a"].metrics.keys() == {"pid"}


def test_a_client_that_kills_its_workers_is_given_up_and_the_others_are_served(actors, ask):
    results, began = run(actors, ask("a", "b", "die"))

    assert results["die"] == Failure("die", 1, "the worker process died 3 times")
    assert began.count("die") == 3
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


def test_closing_gives_up_what_runs_and_the_backend_goes_on(actors, ask):
    results = actors.run(ask("a", "hang-1"), lambda a: None)
    while (first := next(results)) is None:
        pass
    assert first.client == "a"

    results.close()

    assert isinstance(run(actors, ask("b", "c"))[0]["b"], Update)


def pid_of(backend, assignments):
    results, _ = run(backend, assignments)
    [result] = results.values()
    return result.metrics["pid"]


def test_a_worker_that_is_told_to_give_up_keeps_its_process_and_its_model(alone, ask):
    backend = alone(grace_s=60.0)
    before = pid_of(backend, ask("a"))
    running = threading.Event()
    given_up = backend.run(ask("slow"), lambda a: None, lambda a, step, steps: running.set())
    while not running.is_set():
        next(given_up)

    given_up.close()

    assert pid_of(backend, ask("a")) == before


@pytest.mark.slow
def test_a_worker_that_does_not_heed_is_killed_and_nobody_is_charged(alone, ask):
    backend = alone(grace_s=0.2)
    before = pid_of(backend, ask("a"))
    hanging = backend.run(ask("hang-1"), lambda a: None)
    assert next(hanging) is None
    hanging.close()

    results, began = run(backend, ask("a"))

    assert results["a"].metrics["pid"] != before
    assert began == ["a"]


def test_a_reply_that_was_ready_is_drained_and_its_worker_kept(alone, ask):
    backend = alone(grace_s=0.0)
    before = pid_of(backend, ask("a"))
    first = backend.run(ask("b", "c"), lambda a: None)
    assert next(r for r in first if r is not None).client == "b"
    ray.wait(backend._pool.awaited() or list(first.gi_frame.f_locals["run"].running))
    first.close()

    assert pid_of(backend, ask("a")) == before


@pytest.mark.slow
def test_a_silent_worker_is_taken_to_hang_and_its_client_served_elsewhere(alone, ask):
    backend = alone(heartbeat_s=1.5)

    results, began = run(backend, ask("hang-1", "brief"))

    assert isinstance(results["hang-1"], Update)
    assert began.count("hang-1") == 2
    assert began.count("brief") == 1  # it takes longer than the heartbeat, and is heard of


def test_progress_is_heard_of_while_an_assignment_runs(alone, ask):
    heard = []
    [asked] = ask("brief")

    for _ in alone().run([asked], lambda a: None, lambda a, *at: heard.append((a.client, *at))):
        pass

    assert heard
    assert all(client == "brief" and 0 <= k < n == 40 for client, k, n in heard)
    assert heard == sorted(heard)


@pytest.mark.slow
def test_a_worker_whose_memory_grows_is_replaced_between_assignments(alone, ask):
    limit = 700  # a worker that has imported what it needs has some 250, and each adds 64
    backend = alone(recycle_above_mb=limit)

    results, began = run(backend, ask(*(f"hoard-{n}" for n in range(12))))

    assert len({r.metrics["pid"] for r in results.values()}) > 1
    assert len(began) == 12  # nobody was begun twice


def test_growth_is_judged_by_a_warm_worker_s_memory():
    seat = Seat(None)
    grown = []
    for calls, gib in ((1, 9), (2, 3), (3, 5.9), (4, 6.1)):
        seat.calls = calls
        grown.append(seat.has_grown(int(gib * (1 << 30)), None))

    assert grown == [False, False, False, True]


def test_two_runs_at_once_share_the_workers(actors, ask):
    first, second = (actors.run(ask(*names), lambda a: None) for names in ("ab", "cd"))
    done = {"first": [], "second": []}
    for _ in range(200):
        for name, results in (("first", first), ("second", second)):
            result = next(results, None)
            done[name].extend([] if result is None else [result.client])

    assert {name: sorted(clients) for name, clients in done.items()} == {
        "first": ["a", "b"],
        "second": ["c", "d"],
    }


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run_with_the_reason(monkeypatch, ask):
    def broken(threads, perform):
        raise RuntimeError("no library here")

    class Broken(ray_worker.Worker):
        __init__ = lambda self, threads, perform: broken(threads, perform)  # noqa: E731

    monkeypatch.setattr(ray_pool, "Worker", Broken)
    backend = RayBackend(workers=1)

    with pytest.raises(RayUnavailable, match=r"no worker process can start: .*no library here"):
        list(backend.run(ask("a"), lambda a: None))

    backend.close()


def test_a_worker_that_no_machine_can_hold_is_refused_at_once():
    with pytest.raises(RayUnavailable, match=r"no machine of the Ray cluster has 1000 CPUs"):
        RayBackend(workers=1, threads=1000)
    with pytest.raises(RayUnavailable, match=r"1 CPUs and 0\.5 GPUs"):
        RayBackend(workers=1, gpus=0.5)


def test_workers_wait_until_one_has_shown_how_much_memory_it_takes(act, ask, monkeypatch, caplog):
    monkeypatch.setattr(ray_pool, "fitting", lambda peak, private, available: 1)
    backend = RayBackend(workers=None, threads=4, perform=act, clients=5)
    assert backend._pool.size == 2  # eight CPUs
    assert not backend._pool.measured

    results, began = run(backend, ask("brief", "a", "b"))
    backend.close()

    assert began == ["brief", "a", "b"]
    assert len({r.metrics["pid"] for r in results.values()}) == 1
    assert backend._pool.measured
    assert "1 workers instead of 2" in caplog.text


def test_an_initialisation_says_nothing_about_memory_and_training_does(act, ask):
    backend = RayBackend(workers=None, threads=4, perform=act, clients=5)
    [asked] = ask("a")

    run(backend, [replace(asked, action="init")])
    assert not backend._pool.measured
    run(backend, [asked])
    backend.close()

    assert backend._pool.measured
    assert backend._pool.size == 2  # there is memory for two of these


def test_a_worker_looks_at_its_own_memory():
    worker = ray_worker.Worker(1, lambda assignment, stepped: None)

    look = worker.look()

    assert 0 < look.private <= look.peak
    assert look.available > look.private


@pytest.mark.parametrize(
    ("peak", "total", "workers"), [(10, 80, 7), (72, 80, 1), (73, 80, 1), (90, 80, 1), (1, 80, 72)]
)
def test_workers_share_a_gpu_with_a_tenth_of_each_one_s_peak_to_spare(peak, total, workers):
    share = ray_pool.gpu_share(peak, total)

    assert int(1 / share + 1e-9) == workers
    assert workers == 1 or workers * 1.1 * peak <= total


@pytest.mark.parametrize(("peak", "total"), [(0, 80), (0, 0)])
def test_a_worker_that_uses_no_gpu_takes_none(peak, total):
    assert ray_pool.gpu_share(peak, total) == 0.0


def test_the_first_worker_s_peak_says_what_part_of_a_gpu_each_takes(monkeypatch):
    """The first, which has a GPU alone, makes room for the others when it has answered."""
    killed = []
    monkeypatch.setattr(ray_pool, "_kill", killed.extend)
    monkeypatch.setattr(ray_pool, "room", lambda threads, gpus: int(1 / gpus))
    monkeypatch.setattr(ray_pool, "fitting", lambda peak, private, available: 100)
    monkeypatch.setattr(ray_pool.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8}}])
    pool = ray_pool.Pool(1, 1, None, act_nothing, 30.0, None, measured=False, most=3)
    first, waiting = ray_pool.Seat("first", 1.0), ray_pool.Seat("waiting", 1.0)
    pool._idle.extend([first, waiting])

    pool.take()
    pool.measure(ray_worker.Look(1, 2, 2, 9, gpu_peak=10, gpu_total=80))
    assert (pool.measured, pool.gpus, pool.size) == (True, 0.1428, 3)
    assert killed == [waiting]
    pool.keep(first, None)
    assert killed == [waiting, first]
    pool.keep(small := ray_pool.Seat("small", 0.1428), None)
    assert list(pool._idle) == [small]


@pytest.mark.gpu
def test_a_worker_looks_at_what_it_takes_of_its_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    worker = ray_worker.Worker(1, lambda assignment, stepped: None)
    torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")

    look = worker.look()

    assert 1 << 28 <= look.gpu_peak <= look.gpu_total
    assert look.gpu_total == torch.cuda.get_device_properties(0).total_memory


def act_nothing(assignment, stepped):
    raise AssertionError("no worker of this test performs anything")


@pytest.mark.parametrize(
    ("peak", "private", "available", "fits"),
    [(10, 10, 0, None), (0, 0, 100, None), (10, 10, 100, 10), (10, 10, 9, 1), (10, 5, 100, 9)],
)
def test_workers_fit_while_a_tenth_of_what_is_left_stays(peak, private, available, fits):
    assert ray_pool.fitting(peak, private, available) == (fits or sys.maxsize)


def test_a_local_ray_lets_nobody_else_in():
    address = ray.get_runtime_context().gcs_address

    assert not ray_cluster._lets_in(address)


def test_fewer_places_than_workers_are_said_at_once(caplog, act):
    backend = RayBackend(workers=3, threads=4, perform=act)
    backend.close()

    assert backend._pool.size == 2
    assert "room for 2 of the 3 workers" in caplog.text


def test_workers_that_others_leave_no_room_for_are_said_at_once(caplog, act, monkeypatch):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 5.0})  # it lags by seconds
    RayBackend(workers=2, threads=2, perform=act).close()
    assert "wait for room" not in caplog.text
    RayBackend(workers=3, threads=2, perform=act).close()
    assert "1 of the run's 3 workers wait for room (each takes 2 CPUs and 0 GPUs)" in caplog.text


def test_results_are_not_views_of_the_store(actors, ask):
    results, _ = run(actors, ask("a"))

    for tensor in results["a"].tensors.values():
        tensor.add_(1)  # the store's pages are read-only
