"""What a site's answer amounts to: a result, or a failure in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from clients.orders import MOST_HEADER_BYTES, BadReply, Refusal, unpack_reply
from clients.reading import wanted
from clients.session import returned_names, trained_names
from orchestrator.backends.base import Failure, Result
from orchestrator.backends.superlink import Mishap

GONE, CUT_OFF = 3, 5
"""Flower's codes for a message that is there no more, and for a node that is not."""

MOST_BYTES = 4 * 2**30
"""That any reply may have."""

_LONGEST = 500
_SLACK_BYTES = 2 * MOST_HEADER_BYTES
_NUMBER_BYTES = 16  # with its place, which an encoding may send with it, in the widest formats
_TENSOR_BYTES = 4096  # its name, its shape, and a few numbers of an encoding's
_MISHAPS = {
    0: "something went wrong at node {node}, and Flower says no more of it",
    1: "node {node} runs an app of Flower's; start it with: weft node start",
    2: "node {node} could not answer: {reason}",
    3: "no answer of node {node} came in time",
    4: "the answer of node {node} came too late, or was lost on its way",
    5: "node {node} was cut off while it worked",
    6: "node {node} runs an app of Flower's with a mod that refuses: {reason}",
    7: "node {node} takes signed apps of Flower's alone; start it with: weft node start",
    8: "the worker of node {node} died while it worked",
}


def failed(assignment: Assignment, why: str) -> Failure:
    """Return the failure of an assignment."""
    return Failure(assignment.client, assignment.round, why)


def mishap(assignment: Assignment, node: str, what: Mishap) -> Failure:
    """Return the failure that one of Flower's error codes stands for."""
    sentence = _MISHAPS.get(what.code, f"node {{node}} sent Flower's error {what.code}: {{reason}}")
    return failed(assignment, sentence.format(node=node, reason=_printable(what.reason)))


def most_bytes(assignment: Assignment) -> int:
    """Return how many bytes a reply may have: several times what one that is asked for needs.

    Of tensors that the client holds and is to send, whose shapes the assignment does not say, as
    many as any reply may have.
    """
    counts: list[int] = []
    if assignment.action in ("prepare", "consolidate"):
        counts = [math.prod(one) for one in wanted(assignment, assignment.action).values()]
    elif assignment.action == "train":
        parts = (name.partition("/") for name in assignment.held or ())
        if trained_names(assignment, [name for part, _, name in parts if part == "tensors"]):
            return MOST_BYTES
        sent = assignment.broadcast.tensors
        counts = [sent[name].numel() for name in returned_names(assignment)]
    needed = sum(_TENSOR_BYTES + _NUMBER_BYTES * count for count in counts)
    return min(_SLACK_BYTES + needed, MOST_BYTES)


def result_of(
    assignment: Assignment, node: str, data: bytes, learn: Callable[[str, Mapping[str, Any]], None]
) -> Result:
    """Return what a reply says, if it is one to this assignment.

    Args:
        assignment: what was asked.
        node: name of the node that answered.
        data: the reply.
        learn: told of what the node says of itself, before the result is used.
    """
    try:
        reply = unpack_reply(data)
    except BadReply as error:
        return failed(assignment, f"node {node} sent no reply that can be read: {error}")
    result = reply.result
    if isinstance(result, Refusal):  # of an order that it could not read, a node knows no client
        learn(node, reply.node)
        why = _printable(result.reason)
        about = (assignment.client, assignment.round, why)
        return Failure(*about, not_held=result.not_held, final=result.final)
    if (result.client, result.round) != (assignment.client, assignment.round):
        return failed(
            assignment,
            f"node {node} answered for {_printable(result.client)!r} in round {result.round}, and "
            f"was asked for {assignment.client!r} in round {assignment.round}",
        )
    learn(node, reply.node)
    if isinstance(result, Evaluation) != (assignment.action == "evaluate"):
        kind = type(result).__name__.lower()
        return failed(assignment, f"node {node} was asked to {assignment.action} and sent {kind}")
    return result


def _printable(text: str) -> str:
    """Return a stranger's words as part of one line."""
    kept = "".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST])
    return " ".join(kept.split())[:_LONGEST]
