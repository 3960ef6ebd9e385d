"""Flower's SuperNode as weft starts it: what it waits for, and for how long."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    push_object_contents_from_iterable,
)

from clients.flower_supernode import Pauses, push_parts

LOOP = "flwr.supernode.start_client_internal"


class Clock:
    """A clock that sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_the_clock_is_asked_for_two_kinds_of_pauses_alone():
    tree = ast.parse(inspect.getsource(import_module(LOOP)))
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    used = [n.attr for n in used if isinstance(n.value, ast.Name) and n.value.id == "time"]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    asked = [c.args[0].value for c in calls if ast.unparse(c.func) == "time.sleep"]

    assert set(used) == {"sleep"}
    assert set(asked) == {3, 0.5}


def test_looks_for_orders_get_rarer_the_longer_none_comes(clock):
    pauses = Pauses(clock.sleep, clock)
    while clock.now < 120:
        pauses.sleep(3)

    assert clock.slept[0] == 0.2
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == 3
    assert all(p <= max(0.2, sum(clock.slept[:n]) / 20) for n, p in enumerate(clock.slept))
    assert sum(1 for n in range(len(clock.slept)) if sum(clock.slept[:n]) < 60) < 100


def test_an_order_has_looks_begin_anew_and_its_answer_is_found_at_once(clock):
    pauses = Pauses(clock.sleep, clock)
    while clock.now < 120:
        pauses.sleep(3)
    clock.slept.clear()
    for _ in range(1000):
        pauses.sleep(0.5)
    pauses.sleep(3)

    assert clock.slept == [0.05] * 1000 + [0.2]


def test_a_part_that_was_there_already_does_not_end_the_rest():
    taken = []

    def push(name, content):
        if name == "b":
            raise ObjectPushError(name, 1, "session")
        taken.append((name, content))

    parts = [(name, name.encode()) for name in "abc"]
    push_parts(iter(parts), push_object_fn=push, push_all=push_object_contents_from_iterable)

    assert sorted(taken) == [("a", b"a"), ("c", b"c")]


def test_what_else_goes_wrong_with_a_part_does(clock):
    def push(name, content):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        push_parts([("a", b"")], push, push_object_contents_from_iterable)


def test_it_is_what_the_supernode_s_loop_uses():
    code = (
        f"from clients import flower_supernode; import {LOOP} as loop\n"
        "flower_supernode.quicken()\n"
        "print(type(loop.time).__name__, loop.pull_objects.keywords,\n"
        "      loop.push_object_contents_from_iterable.func.__name__)\n"
        "from flwr.supercore import heartbeat; from flwr.supernode import fleet_http_connection\n"
        "print(heartbeat.HEARTBEAT_DEFAULT_INTERVAL,\n"
        "      fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    waits = {"initial_backoff": 0.1, "backoff_cap": 1.0}
    assert done.stdout == f"Pauses {waits} push_parts\n15 15\n"
