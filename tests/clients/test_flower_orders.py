"""Orders and replies in Flower's records."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from clients.flower import order_of, order_record, reply_of, reply_record
from clients.orders import BadOrder, BadReply, Order

ORDER = Order(b'{"format":"weft-order-1"}', {"a" * 64: bytes(range(256)), "b" * 64: b"\0" * 9})


def test_an_order_is_the_same_on_the_other_side():
    assert order_of(order_record(ORDER)) == ORDER
    assert order_of(order_record(Order(b"{}", {}))) == Order(b"{}", {})


def objects(records):
    """Return the sizes of what Flower sends one by one."""
    return {name: len(one.deflate()) for name, one in get_all_nested_objects(records).items()}


@pytest.mark.parametrize("size", [256, 3 << 20])
def test_parts_that_two_orders_share_are_the_same_object_to_flower(size):
    parts = {"a" * 64: bytes(size), "b" * 64: b"1"}
    first, second = (objects(order_record(Order(h, parts))) for h in (b"{}", b"{1}"))

    assert max(first[name] for name in set(first) & set(second)) > size  # the bytes themselves
    assert order_of(order_record(Order(b"{}", parts))) == Order(b"{}", parts)


def test_a_large_part_is_shared_by_orders_with_other_small_ones():
    large = {"a" * 64: bytes(3 << 20)}
    first, second = (objects(order_record(Order(b"{}", large | {k * 64: b"1"}))) for k in "bc")

    assert max(first[name] for name in set(first) & set(second)) > 3 << 20


def test_what_is_small_travels_in_few_requests():
    assert len(objects(order_record(ORDER))) == 3
    assert len(objects(reply_record(bytes(2**20)))) == 2
    large = objects(reply_record(bytes(2**23)))
    assert max(large.values()) < 6_000_000  # what a proxy lets through, three times over


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**20 + 1])
def test_a_reply_is_the_same_on_the_other_side(size):
    assert reply_of(reply_record(bytes(size))) == bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"weft.order": ConfigRecord({"header": "text"}), "weft.parts": ArrayRecord()}),
        RecordDict({"weft.order": ConfigRecord({}), "weft.parts": ArrayRecord()}),
        RecordDict({"weft.order": ConfigRecord({"header": b"{}"})}),
        RecordDict(
            {"weft.order": ConfigRecord({"header": b"{}"}), "weft.parts": ConfigRecord({"a": "b"})}
        ),
        RecordDict(
            {"weft.order": ConfigRecord({"header": b"{}"}), "weft.parts": MetricRecord({"a": 1})}
        ),
        RecordDict(
            {
                "weft.order": ConfigRecord({"header": b"{}"}),
                "weft.parts": ArrayRecord({"a": Array(np.zeros(2))}),
            }
        ),
    ],
)
def test_what_is_no_order_is_refused(content):
    with pytest.raises(BadOrder, match="message"):
        order_of(content)


def test_what_is_no_reply_is_refused():
    wrong = RecordDict({"weft.reply": ConfigRecord({"weft.reply": "text"})})
    for content in (RecordDict(), order_record(ORDER), wrong):
        with pytest.raises(BadReply, match="the message holds no reply"):
            reply_of(content)
