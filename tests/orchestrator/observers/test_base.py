"""An observer that fails stops nothing."""

import logging

import pytest

from orchestrator.observers.base import Observers


class Noting:
    __hash__ = None

    def __init__(self):
        self.seen, self.closed = [], 0

    def __call__(self, kind, data):
        self.seen.append(kind)

    def close(self):
        self.closed += 1


class Broken(Noting):
    def __call__(self, kind, data):
        raise KeyError(kind)

    def close(self):
        raise OSError("disk full")


def test_every_observer_is_told_in_order_and_closed():
    first, second = Noting(), Noting()
    with Observers(first, second) as observers:
        observers("run", {})
        observers("anything at all", {"x": object()})

    assert first.seen == second.seen == ["run", "anything at all"]
    assert (first.closed, second.closed) == (1, 1)


def test_one_that_fails_is_logged_once_and_the_others_go_on(caplog):
    noting = Noting()
    with caplog.at_level(logging.ERROR), Observers(Broken(), noting) as observers:
        for _ in range(3):
            observers("round", {})

    assert noting.seen == ["round"] * 3
    assert noting.closed == 1
    [record] = caplog.records
    assert "Broken failed at the event 'round'" in record.getMessage()


def test_an_interrupt_is_nobody_s_failure():
    class Interrupted(Noting):
        def __call__(self, kind, data):
            raise KeyboardInterrupt

    noting = Interrupted()
    with pytest.raises(KeyboardInterrupt), Observers(noting) as observers:
        observers("round", {})

    assert noting.closed == 1
