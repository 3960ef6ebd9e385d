"""What waits joins the batch between two steps; what is late, left or too much is not answered."""

import threading
from dataclasses import dataclass

import pytest

from orchestrator.serving.engine import Broken, Engine, Overloaded, Stopping

LONG = 60.0


@dataclass(frozen=True)
class Said:
    text: str
    is_last: bool = False


class Steps:
    """A worker whose every step the test lets happen; an ask is how many steps it takes."""

    def __init__(self, most=2):
        self.most, self.running, self.batches = most, {}, []
        self.allowed, self.reached = threading.Semaphore(0), threading.Semaphore(0)
        self.breaks = False

    @property
    def num_running(self):
        return len(self.running)

    def fits(self, chosen, another):
        return len(self.running) + len(chosen) < self.most

    def admit(self, asked):
        self.running |= dict(asked)
        self.batches.append(sorted(self.running))
        return [(key, Said("begun")) for key, _ in asked]

    def step(self):
        self.reached.release()
        self.allowed.acquire()
        if self.breaks:
            raise RuntimeError("out of memory")
        self.running = {key: left - 1 for key, left in self.running.items()}
        said = [(key, Said("more", left == 0)) for key, left in self.running.items()]
        self.running = {key: left for key, left in self.running.items() if left}
        return said

    def cancel(self, keys):
        self.running = {key: left for key, left in self.running.items() if key not in keys}

    def let(self, steps=1):
        for _ in range(steps):
            self.allowed.release()


class Box:
    """What a request was told, and when the last of it came."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if event.is_last:
            self.over.set()

    def last(self):
        assert self.over.wait(LONG)
        return self.events[-1]


@pytest.fixture
def steps():
    return Steps()


@pytest.fixture
def engine(steps):
    made = Engine(steps, most_waiting=3)
    made.start()
    yield made
    steps.let(1000)
    made.close(drain=False)


def submit(engine, ask=1, timeout_s=LONG):
    box = Box()
    return engine.submit(ask, timeout_s, box), box


def test_a_request_joins_those_that_run_as_soon_as_there_is_room(engine, steps):
    one = submit(engine, 2)[1]
    steps.reached.acquire()
    second, two = submit(engine, 3)
    steps.let(1)
    steps.reached.acquire()
    third, three = submit(engine, 1)
    assert engine.load().waiting == 1  # two run, and two fit
    steps.let(3)
    assert all(isinstance(box.last(), Said) for box in (one, two, three))
    assert steps.batches[-1] == [second.key, third.key]
    assert [event.text for event in one.events] == ["begun", "more", "more"]


def test_what_waits_beyond_the_limit_is_refused_with_a_time(engine, steps):
    submit(engine, 5)
    steps.reached.acquire()  # one runs
    for _ in range(3):
        submit(engine)
    with pytest.raises(Overloaded, match="3 requests wait already; try again in 1 s") as refused:
        submit(engine)
    assert refused.value.retry_after_s == 1


def test_a_request_that_is_late_is_told_so_and_its_place_is_free(engine, steps):
    _, late = submit(engine, 100, timeout_s=1e-9)
    assert late.last() == Broken("timeout")
    _, next_one = submit(engine, 1)
    steps.let(1)
    assert next_one.last() == Said("more", True)


def test_a_cancelled_request_is_told_nothing_more(engine, steps):
    job, box = submit(engine, 100)
    steps.reached.acquire()
    engine.cancel(job)
    steps.let(1)
    _, other = submit(engine, 1)
    steps.let(2)
    other.last()
    assert not box.over.is_set()
    assert engine.load().running == 0


def test_a_model_that_fails_fails_its_batch_and_no_later_one(engine, steps, caplog):
    steps.breaks = True
    _, box = submit(engine, 5)
    steps.let(1)
    assert box.last() == Broken("error")
    steps.breaks = False
    _, later = submit(engine, 1)
    steps.let(1)
    assert later.last() == Said("more", True)
    assert "out of memory" in caplog.text


def test_a_call_runs_between_two_steps_and_hands_its_error_over(engine, steps):
    submit(engine, 3)
    steps.reached.acquire()
    done = engine.call(lambda: threading.current_thread().name)
    assert not done.done()
    steps.let(1)
    assert done.result(LONG) == "weft-serve"
    failed = engine.call(lambda: 1 // 0)
    steps.let(5)
    with pytest.raises(ZeroDivisionError):
        failed.result(LONG)


def test_an_engine_that_closes_answers_what_it_has_and_takes_nothing_new(engine, steps):
    boxes = [submit(engine, 2)[1] for _ in range(3)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    steps.let(6)
    assert [box.last() for box in boxes] == [Said("more", True)] * 3
    closing.join(LONG)
    with pytest.raises(Stopping):
        submit(engine)
    assert not engine.is_alive


def test_an_engine_that_ends_at_once_says_so_to_everybody(engine, steps):
    boxes = [submit(engine, 50)[1] for _ in range(3)]
    steps.reached.acquire()
    closing = threading.Thread(target=engine.close, args=(False,))
    closing.start()
    while not engine._stopped:
        pass
    steps.let(1)
    closing.join(LONG)
    assert [box.last() for box in boxes] == [Broken("stopped")] * 3


def test_an_engine_that_fails_itself_leaves_nobody_waiting(engine, steps, caplog):
    def cancel(keys):
        raise RuntimeError("out of memory again")

    steps.cancel, steps.breaks = cancel, True
    boxes = [submit(engine, 5)[1] for _ in range(3)]
    steps.let(1)
    assert [box.last() for box in boxes] == [Broken("stopped")] * 3
    with pytest.raises(Stopping):
        submit(engine)
    with pytest.raises(Stopping):
        engine.call(list)
    engine.close()
    assert not engine.is_alive
    assert "nothing is answered any more" in caplog.text
