"""Orders and replies in Flower's records."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from clients.flower import order_of, order_record, reply_of, reply_record
from clients.orders import BadOrder, BadReply, Order

ORDER = Order(b'{"format":"weft-order-1"}', {"a" * 64: bytes(range(256)), "b" * 64: b"\0" * 9})


def test_an_order_is_the_same_on_the_other_side():
    assert order_of(order_record(ORDER)) == ORDER
    assert order_of(order_record(Order(b"{}", {}))) == Order(b"{}", {})


def test_a_part_that_two_orders_share_is_the_same_object_to_flower():
    other = Order(b"{}", {"a" * 64: ORDER.parts["a" * 64]})

    first, second = (get_all_nested_objects(order_record(o)) for o in (ORDER, other))

    sizes = [len(first[name].deflate()) for name in set(first) & set(second)]
    assert max(sizes) > 256  # the bytes themselves


def test_a_reply_is_the_same_on_the_other_side():
    assert reply_of(reply_record(b"reply")) == b"reply"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"weft.order": ConfigRecord({"header": "text"}), "weft.parts": ArrayRecord()}),
        RecordDict({"weft.order": ConfigRecord({}), "weft.parts": ArrayRecord()}),
        RecordDict({"weft.order": ConfigRecord({"header": b"{}"})}),
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
    for content in (RecordDict(), order_record(ORDER)):
        with pytest.raises(BadReply, match="the message holds no reply"):
            reply_of(content)
