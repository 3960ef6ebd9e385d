"""Flower's messages as weft makes and reads them; those that arrive are of strangers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


class Unreadable(ValueError):
    """A message whose objects cannot be had, or make no message."""


class TooLarge(Unreadable):
    """A message of more bytes than are taken."""


def instruction(content: RecordDict, where: Mapping[str, int], ttl: float, group: str) -> Message:
    """Return a message to a node that says by itself which run it belongs to.

    Flower's own constructor takes that from the process, which could then drive one run alone.

    Args:
        content: what it says.
        where: numbers of the ``run``, the ``task`` that sends it, and the ``node`` that it is for.
        ttl: seconds until nobody needs it any more, > 0.
        group: shown in the node's log.
    """
    metadata = Metadata(
        run_id=where["run"],
        message_id="",
        src_node_id=1,
        dst_node_id=where["node"],
        reply_to_message_id="",
        group_id=group,
        created_at=time.time(),
        ttl=ttl,
        message_type="train",
        src_task_id=where["task"],
    )
    metadata.delivered_at = ""
    return make_message(metadata=metadata, content=content)


def bare(about: Any) -> Message:
    """Return a message without its content, from Flower's words about it."""
    return make_message(metadata=metadata_from_proto(about), content=RecordDict())


def reply(content: RecordDict | Error, to: Message) -> Message:
    """Return the reply to a message."""
    return Message(content, reply_to=to)


def inflated(name: str, contents: dict[str, bytes], most_bytes: int) -> Message:
    """Return the message that objects make.

    Args:
        name: of the message's own.
        contents: all of them, by name; they are taken out.
        most_bytes: that the message may have.

    Raises:
        Unreadable: if it is too large (TooLarge), or they make none.
    """
    try:
        if _unfolded(contents) > most_bytes:
            raise TooLarge(f"it is larger than {most_bytes} bytes")
        message = inflate_object_from_contents(name, contents)
    except TooLarge:
        raise
    except Exception as error:  # hostile bytes, read by code that is not ours
        raise Unreadable(f"its bytes are no message ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise Unreadable(f"its bytes are a {type(message).__name__}, not a message")
    message.metadata.__dict__["_message_id"] = name
    return message


def _unfolded(contents: Mapping[str, bytes]) -> int:
    """Return how many bytes arrays have when their chunks are in place, each of which may recur."""
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in chunks)
    return total
