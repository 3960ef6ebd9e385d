"""A site's end in Flower: answers what its SuperNode is sent, in one process that stays.

A SuperNode that was started with ``--isolation process`` runs no code of its own accord: it hands
each message to whoever knows its secret. This process takes them one at a time, and does what
*weft* does with an order, whatever app the message came with: code that arrives is never loaded.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Error, RecordDict

from clients.flower import order_of, reply_record
from clients.flower_heartbeat import Heartbeat
from clients.flower_messages import TooLarge, Unreadable, bare, reply
from clients.flower_runtime import Endpoint, Lost, Refused, Runtime, RuntimeGone, TaskLost
from clients.orders import MOST_PART_BYTES, BadOrder, Order
from clients.pace import pause_after

__all__ = ["Answer", "Answering", "serve"]

Answer = Callable[[Order], bytes]
"""What is done with an order: a packed reply, which is a refusal where it failed."""

_LOG = logging.getLogger(__name__)
_LONGEST_POLL_S = 0.5
_RAISED = 2
"""Flower's code for an app that raised an exception."""


@dataclass(frozen=True, slots=True)
class Answering:
    """How a site answers its SuperNode.

    Attributes:
        address: of the SuperNode's Runtime API, host and port; on this machine, so without TLS.
        secret: that the SuperNode was started with.
        poll_s: seconds between two looks for a message, at least; > 0.
        most_bytes: that an order may have.
    """

    address: str
    secret: bytes
    poll_s: float = 0.05
    most_bytes: int = MOST_PART_BYTES


def serve(answering: Answering, answer: Answer, stop: threading.Event) -> None:
    """Answer messages, one at a time, until ``stop`` is set.

    A SuperNode that is not there, or is there again, is waited for. What it gave a message for and
    does not want any more is still worked at: the answer is kept, and comes when it is asked again.

    Args:
        answering: whom, and how.
        answer: does what an order says; whatever it raises is a bug, and is answered without its
            text, which might hold data.
        stop: ends it when the message in hand is answered.

    Raises:
        Refused: if the SuperNode is of another Flower version, or has another secret.
    """
    endpoint = Endpoint(answering.address, plain=True)
    claims = Runtime(endpoint, "SuperExec", secret=answering.secret)
    away, idle_since = False, time.monotonic()
    try:
        while not stop.is_set():
            try:
                token = claims.acquire("flwr-clientapp")
            except TaskLost as error:
                raise Refused(
                    f"the SuperNode at {answering.address} does not take the secret; start it with "
                    "--superexec-auth-secret-file and the same file"
                ) from error
            except RuntimeGone:
                if not away:
                    _LOG.info("waiting for the SuperNode at %s", answering.address)
                away = True
                stop.wait(max(0.5, answering.poll_s))
                continue
            away = False
            if token is None:
                idle_s = time.monotonic() - idle_since
                stop.wait(pause_after(idle_s, answering.poll_s, _LONGEST_POLL_S))
                continue
            _one(Runtime(endpoint, "flwr-clientapp", token), answering, answer)
            idle_since = time.monotonic()
    finally:
        claims.close()


def _one(task: Runtime, answering: Answering, answer: Answer) -> None:
    """Answer one message; that it cannot be delivered any more is no error here."""
    heartbeat = Heartbeat(task.beat)
    try:
        begun = task.begin()
        node, run = begun.context.node_id, begun.run.run_id
        waiting = task.waiting()
        if not waiting:
            task.end("the message is there no more")
            return
        [(about, tree)] = waiting
        try:
            message = task.fetch(tree, node, run, answering.most_bytes)
        except Lost:
            raise
        except Unreadable as error:
            message, problem = bare(about), _not_taken(error)
            content: RecordDict | Error = Error(_RAISED, problem)
        else:
            problem, content = _answered(message.content if message.has_content() else None, answer)
        task.send(reply(content, message), node, run)
        task.end(problem)
    except (RuntimeGone, TaskLost, Refused, Lost) as error:
        _LOG.warning("a message could not be answered: %s", error)
    finally:
        heartbeat.stop()
        task.close()


def _not_taken(error: Unreadable) -> str:
    limit = ", which is max_order_mb in its node.yaml" if isinstance(error, TooLarge) else ""
    problem = f"this site does not take the order: {error}{limit}"
    _LOG.warning("%s", problem)
    return problem


def _answered(content: RecordDict | None, answer: Answer) -> tuple[str, RecordDict | Error]:
    """Return what went wrong, if anything did, and what is replied."""
    try:
        order = order_of(content if content is not None else RecordDict())
    except BadOrder as error:
        problem = f"this site answers weft's orders alone: {error}"
        return problem, Error(_RAISED, problem)
    try:
        return "", reply_record(answer(order))
    except Exception as error:  # a bug; whoever asked must hear that there will be no answer
        where = "".join(traceback.format_tb(error.__traceback__))  # without what it says
        _LOG.error("an order could not be answered: %s\n%s", type(error).__name__, where)
        problem = f"{type(error).__name__} at the site (its text stays there)"
        return problem, Error(_RAISED, problem)
