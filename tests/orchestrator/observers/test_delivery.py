"""What is slow is done elsewhere, in order; what does not fit is dropped and counted."""

import logging
import threading

from orchestrator.observers.delivery import Delivery


def test_work_is_done_in_order_on_another_thread():
    done, threads = [], set()
    delivery = Delivery("post")
    for number in range(50):
        delivery(lambda n=number: (done.append(n), threads.add(threading.current_thread().name)))
    delivery.close()

    assert done == list(range(50))
    assert threads == {"post"}
    assert delivery.dropped == 0


def test_a_full_queue_drops_and_never_blocks(caplog):
    begun, go, done = threading.Event(), threading.Event(), []
    delivery = Delivery("post", size=2)
    delivery(lambda: (begun.set(), go.wait()))
    assert begun.wait(10)

    for number in range(5):  # would never return, were it to wait
        delivery(lambda n=number: done.append(n))
    assert delivery.dropped == 3
    go.set()
    with caplog.at_level(logging.WARNING):
        delivery.close()

    assert done == [0, 1]
    assert "post: 3 messages were not delivered" in caplog.text


def test_closing_does_not_wait_for_ever(caplog):
    begun, go = threading.Event(), threading.Event()
    delivery = Delivery("post", patience_s=0.01)
    delivery(lambda: (begun.set(), go.wait()))
    assert begun.wait(10)
    with caplog.at_level(logging.WARNING):
        delivery.close()
    go.set()

    assert "and one was still under way" in caplog.text


def test_work_that_fails_is_said_once_and_the_rest_is_done(caplog):
    done = []
    delivery = Delivery("post")

    def fail():
        raise ValueError("no")

    with caplog.at_level(logging.ERROR):
        for work in (fail, fail, lambda: done.append(1)):
            delivery(work)
        delivery.close()

    assert done == [1]
    assert len(caplog.records) == 1


def test_without_work_there_is_no_thread_and_after_the_end_no_more_work():
    delivery, done = Delivery("post"), []
    before = threading.active_count()
    delivery.close()
    delivery(lambda: done.append(1))
    delivery.close()

    assert threading.active_count() == before
    assert done == []
