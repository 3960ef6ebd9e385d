"""The coordinator's end in Flower: a SuperLink's nodes, and one run's messages to them.

A SuperLink that was started with ``--isolation process`` runs no code for a run: it hands the run's
task to whoever knows its secret, which is this process. The run's app is a thin one, whose two
modules import the weft that is installed where they run (:mod:`orchestrator.flower_app`).

All that weft uses of Flower beyond its documented interface is here and in
:mod:`clients.flower_runtime` and :mod:`clients.flower_messages`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.control import ControlHttpClient

from clients.flower_heartbeat import Heartbeat
from clients.flower_messages import Unreadable, instruction
from clients.flower_runtime import (
    Endpoint,
    Lost,
    Refused,
    Runtime,
    RuntimeGone,
    TaskLost,
    Versions,
    Wanted,
    patiently,
)
from orchestrator.backends.thin_app import thin_app

if TYPE_CHECKING:
    from clients.orders import Order

__all__ = [
    "Arrived",
    "Claim",
    "Endpoint",
    "KeySpent",
    "Lost",
    "Mishap",
    "Node",
    "Refused",
    "RuntimeGone",
    "SuperLink",
    "Task",
    "TaskLost",
    "Unreadable",
    "Wanted",
    "canonical_key",
    "refresh_key",
]

_COORDINATOR = 1
"""Flower's number for the SuperLink's own end of a message."""

_CLAIM_WITHIN_S = 15.0
_NEVER = 0.0


class KeySpent(ValueError):
    """A public key that the SuperLink knew once, and takes no more."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that a SuperLink knows.

    Attributes:
        id: number; another one each time that its key is registered.
        public_key: PEM.
        name: as it was registered.
        status: ``registered`` (never seen), ``online``, ``offline`` or ``unregistered``.
        activated: Unix seconds at which it came online last; 0 for never.
        last_seen: Unix seconds of its last sign of life; 0 for never.
    """

    id: int
    public_key: bytes
    name: str
    status: str
    activated: float
    last_seen: float

    @property
    def online(self) -> bool:
        """Whether it has given a sign of life lately."""
        return self.status == "online"


@dataclass(frozen=True, slots=True)
class Task:
    """A claim on a Flower run: all that another process needs to go on with it.

    Attributes:
        token: secret.
        run: Flower's number of the run.
        id: Flower's number of the run's task.
    """

    token: str
    run: int
    id: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A reply that is there, without its content.

    Attributes:
        to: id of the message that it answers.
        tree: what it consists of; None where whoever told of it knows.
    """

    to: str
    tree: ObjectTree | None = None


@dataclass(frozen=True, slots=True)
class Mishap:
    """What Flower says in place of a reply.

    Attributes:
        code: Flower's.
        reason: as whoever it came from says it.
    """

    code: int
    reason: str


@dataclass(slots=True)
class SuperLink:
    """A SuperLink, to whoever administers it.

    Attributes:
        endpoint: where it is.
        secret: against which it hands out the task of a run.
        database: its SQLite file, where that is on this machine: only there can a key that was
            unregistered be registered again.
    """

    endpoint: Endpoint
    secret: bytes = field(repr=False)
    database: Path | None = None
    _control: ControlHttpClient = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._control = ControlHttpClient.from_server_address(
            **self.endpoint.connection, interceptors=[Versions("flwr CLI")]
        )

    def nodes(self) -> list[Node]:
        """Return the nodes that are registered.

        Raises:
            RuntimeGone: if the SuperLink does not answer.
        """
        with self.endpoint.calls():
            answer = self._control.ListNodes(ListNodesRequest())
        return [
            Node(
                id=one.node_id,
                public_key=one.public_key,
                name=one.name,
                status=one.status,
                activated=_seconds(one.last_activated_at),
                last_seen=_last_seen(one.online_until, one.heartbeat_interval),
            )
            for one in answer.nodes_info
            if one.status != "unregistered"
        ]

    def register(self, public_key: str | bytes, name: str) -> int:
        """Let the node with a key take part; return its number.

        Raises:
            KeySpent: if the key was registered before, and the database is not at hand.
            Refused: if the SuperLink does not take the key.
            RuntimeGone: if the SuperLink does not answer.
        """
        key = canonical_key(public_key)
        known = {node.public_key: node.id for node in self.nodes()}
        if key in known:
            return known[key]
        if self.database is not None:
            refresh_key(self.database, key)
        try:
            with self.endpoint.calls():
                request = RegisterNodeRequest(public_key=key, name=name)
                return self._control.RegisterNode(request).node_id
        except Refused as error:
            if "already in use" not in str(error):
                raise
            raise KeySpent(
                f"the key of node {name!r} was unregistered at the SuperLink, which takes a key "
                "once; enable it where weft superlink start runs, or make a new key at the site "
                "with: weft node rotate"
            ) from error

    def unregister(self, node: int) -> None:
        """Let a node take no more part: whatever it asks from now on is refused.

        Raises:
            Refused: if there is none with this number.
            RuntimeGone: if the SuperLink does not answer.
        """
        with self.endpoint.calls():
            self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def stop(self, run: int) -> None:
        """Stop a Flower run; one that is finished stays so.

        Raises:
            RuntimeGone: if the SuperLink does not answer.
        """
        try:
            with self.endpoint.calls():
                self._control.StopRun(StopRunRequest(run_id=run))
        except Refused:
            return

    def claim(self) -> Claim:
        """Start a Flower run and claim its task.

        Raises:
            RuntimeGone: if the SuperLink does not answer.
            Refused: if it starts no run, or takes another secret.
        """
        fab = thin_app()
        digest = hashlib.sha256(fab).hexdigest()
        with self.endpoint.calls():
            request = StartRunRequest(fab=Fab(hash_str=digest, content=fab))
            if not self._control.StartRun(request).run_id:
                raise Refused(f"{self.endpoint.address} did not start a run")
        return self._claimed(digest)

    def _claimed(self, digest: str) -> Claim:
        """Return the claim on the oldest run that waits: any of ours is as good as another."""
        claims = Runtime(self.endpoint, "SuperExec", secret=self.secret)
        until = time.monotonic() + _CLAIM_WITHIN_S
        try:
            while time.monotonic() < until:
                token = claims.acquire("flwr-serverapp")
                if token is None:
                    time.sleep(0.1)
                    continue
                task = Runtime(self.endpoint, "flwr-serverapp", token)
                begun = task.begin()
                if begun.run.fab_hash == digest:
                    return Claim(Task(token, begun.run.run_id, begun.task_id), task)
                task.end("this SuperLink is weft's, which runs no other app")
                task.close()
        except TaskLost as error:
            raise Refused(
                f"the SuperLink at {self.endpoint.address} does not take the secret; use the file "
                "that it was started with"
            ) from error
        finally:
            claims.close()
        raise Refused(f"{self.endpoint.address} handed out no task of the run that it started")

    def attach(self, task: Task) -> Claim:
        """Go on with a run that another process has claimed, and does not drive any more.

        Raises:
            TaskLost: if its time is over.
            RuntimeGone: if the SuperLink does not answer.
        """
        runtime = Runtime(self.endpoint, "flwr-serverapp", task.token)
        try:
            runtime.beat()
        except Exception:
            runtime.close()
            raise
        return Claim(task, runtime)

    def close(self) -> None:
        """Close the connection."""
        self._control.close()


@dataclass(slots=True)
class Claim:
    """A Flower run that this process drives; it gives signs of life by itself.

    Attributes:
        task: what it has claimed.
    """

    task: Task
    _runtime: Runtime = field(repr=False)
    _heartbeat: Heartbeat = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._heartbeat = Heartbeat(self._runtime.beat)

    @property
    def lost(self) -> bool:
        """Whether the run is over, whatever is still to be done."""
        return self._heartbeat.lost.is_set()

    def push(self, node: int, order: Order, deadline: float, group: str) -> str:
        """Send an order to a node and return the message's id.

        Args:
            node: its number.
            order: what to do.
            deadline: Unix seconds after which nobody waits for an answer.
            group: shown in the node's log.

        Raises:
            Refused: if the SuperLink does not take it: the node has never been there, say.
            TaskLost: if the run is over.
            RuntimeGone: if the SuperLink does not answer.
        """
        from clients.flower import order_record  # with it torch, which who sends no order needs not

        where = {"run": self.task.run, "task": self.task.id, "node": node}
        ttl = max(deadline - time.time(), 0.001)
        message = instruction(order_record(order), where, ttl, group)
        return self._runtime.send(message, _COORDINATOR, self.task.run)

    def replies(self, ids: Iterable[str]) -> list[Arrived]:
        """Return what has come in reply to messages; each is told of once.

        Raises:
            TaskLost: if the run is over.
            RuntimeGone: if the SuperLink does not answer.
        """
        asked: Sequence[str] = sorted(ids)
        found = self._runtime.waiting(asked) if asked else []
        return [Arrived(about.reply_to_message_id, tree) for about, tree in found]

    def fetch(
        self, arrived: Arrived, most_bytes: int, wanted: Wanted = patiently
    ) -> bytes | Mishap:
        """Return what a reply says, once it is here.

        Args:
            arrived: the reply.
            most_bytes: that it may have.
            wanted: whether its next part is still, after so many seconds.

        Raises:
            Lost: if it does not arrive.
            Unreadable, BadReply: if it is no reply.
            TaskLost: if the run is over.
            RuntimeGone: if the SuperLink does not answer.
        """
        from clients.flower import reply_of
        from clients.orders import BadReply

        assert arrived.tree is not None  # as :meth:`replies` says it
        tree, run = arrived.tree, self.task.run
        message = self._runtime.fetch(tree, _COORDINATOR, run, most_bytes, wanted)
        if message.has_error():
            return Mishap(message.error.code, message.error.reason or "")
        if not message.has_content():
            raise BadReply("the reply is empty")
        return reply_of(message.content)

    def finish(self, problem: str = "") -> None:
        """End the run, well or with a problem; one that is over stays so."""
        try:
            self._runtime.end(problem)
        except (Refused, RuntimeGone, TaskLost):
            return

    def close(self) -> None:
        """Give no more signs of life; within a minute another process can go on."""
        self._heartbeat.stop()
        self._runtime.close()


def canonical_key(public_key: str | bytes) -> bytes:
    """Return a public key as Flower knows it: PEM, whatever it comes in.

    Raises:
        ValueError: if it is none.
    """
    data = public_key.encode() if isinstance(public_key, str) else public_key
    if data.lstrip().startswith(b"-----"):
        key = serialization.load_pem_public_key(data)
    else:
        key = serialization.load_ssh_public_key(data)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def refresh_key(database: Path, public_key: bytes) -> None:
    """Make a SuperLink forget that a key was unregistered, so that it can be registered again.

    Flower keeps the row of a node for ever, and no key twice.
    """
    with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        connection.execute(
            "DELETE FROM node WHERE public_key = ? AND status = 'unregistered'", (public_key,)
        )


def _seconds(moment: str) -> float:
    """Return an ISO 8601 moment as Unix seconds; 0 for none."""
    return datetime.fromisoformat(moment).timestamp() if moment else _NEVER


def _last_seen(online_until: float, interval: float) -> float:
    """Return when a node gave its last sign of life, from when Flower takes it to be gone.

    Within two intervals of it; a node that said farewell is gone at that moment.
    """
    now = time.time()
    return min(online_until - 2 * interval if online_until > now else online_until, now)
