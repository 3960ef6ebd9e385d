"""Flower's Runtime API, over which tasks are claimed and messages go in and out.

A SuperLink has it for whoever drives a run, a SuperNode for whoever answers its messages; both hand
out tasks against a secret, and everything else against a task's token. Flower's own clients for it
end the process when a token is refused or a version does not fit, and wait for seconds where there
is nothing to wait for, so none of them is used: only its requests, and its records as objects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import httpx
from flwr.app import Message, Metadata
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from clients.flower_messages import TooLarge, Unreadable, inflated
from clients.pace import pause_after

__all__ = ["Endpoint", "Lost", "Refused", "Runtime", "RuntimeGone", "TaskLost"]

_ARRIVES_WITHIN_S = 200.0
"""Seconds without any object of a message, after which Flower gives up its upload (180)."""

_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0
_AWAY = frozenset({502, 503, 504})
_LOST = frozenset({401, 403})


class RuntimeGone(ConnectionError):
    """Nobody answers where Flower's Runtime API should be."""


class TaskLost(RuntimeError):
    """A task's token is taken no more: somebody ended the task, or it was silent for too long."""


class Refused(RuntimeError):
    """A request was understood, and refused."""


class Lost(Unreadable):
    """A message of which a part did not arrive: whoever sent it was cut off."""


Wanted: TypeAlias = Callable[[float], bool]
"""Whether a part of a message is still waited for, after so many seconds."""


def patiently(waited_s: float) -> bool:
    """Wait for as long as Flower may be sent a part."""
    return waited_s <= _ARRIVES_WITHIN_S


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one of Flower's HTTP services is.

    Attributes:
        address: host and port.
        root_certificates: whom to believe that it is that service, PEM; None for those whom the
            system believes.
        plain: whether it is without TLS, which only a machine's own services may be.
    """

    address: str
    root_certificates: bytes | None = None
    plain: bool = False

    @property
    def connection(self) -> dict[str, Any]:
        """What Flower's clients take of it."""
        return {
            "server_address": self.address,
            "insecure": self.plain,
            "root_certificates": self.root_certificates,
        }

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Raise our own errors for what goes wrong within.

        Raises:
            RuntimeGone: if there is no answer, or one that says to come again.
            TaskLost: if the token is not, or no more, known.
            Refused: if the request was refused.
        """
        try:
            yield
        except httpx.TransportError as error:
            raise RuntimeGone(f"{self.address} does not answer ({error or type(error)})") from error
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            if code in _AWAY:
                raise RuntimeGone(f"{self.address} is not there yet (HTTP {code})") from error
            why = f"{self.address} refuses the request: {_reason(error.response)}"
            raise (TaskLost(why) if code in _LOST else Refused(why)) from error


@dataclass(frozen=True, slots=True)
class Versions:
    """Tells the other side which Flower this is; what does not fit it refuses by itself.

    Attributes:
        component: what of Flower the caller stands for.
    """

    component: str

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers to a request, and send it."""
        told = RuntimeVersionMetadata.from_local_component(self.component)
        context.request.headers.update(dict(told.as_metadata()))
        return call_next(context)


@dataclass(slots=True)
class Runtime:
    """The Runtime API for one task, or for whoever claims tasks.

    Attributes:
        endpoint: where it is.
        component: what of Flower the caller stands for.
        token: of the task.
        secret: against which tasks are handed out.
    """

    endpoint: Endpoint
    component: str
    token: str | None = None
    secret: bytes | None = None
    _client: RuntimeHttpClient = field(init=False)

    def __post_init__(self) -> None:
        interceptors: list[Any] = [Versions(self.component)]
        if self.token is not None:
            interceptors.append(RuntimeTokenHttpInterceptor(self.token))
        if self.secret is not None:
            guarded = {"/flwr.proto.Runtime/AcquireTask"}
            auth = SuperExecAuthHttpInterceptor(
                master_secret=self.secret, protected_methods=guarded
            )
            interceptors.append(auth)
        self._client = RuntimeHttpClient.from_server_address(
            **self.endpoint.connection, interceptors=interceptors
        )

    def acquire(self, kind: Literal["flwr-serverapp", "flwr-clientapp"]) -> str | None:
        """Claim the oldest task of a kind and return its token; None if none waits."""
        with self.endpoint.calls():
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
        return answer.token if answer.HasField("task") else None

    def begin(self) -> PullTaskInputResponse:
        """Begin with the task; return what Flower says of it. It can be begun once."""
        with self.endpoint.calls():
            return self._client.PullTaskInput(PullTaskInputRequest())

    def beat(self) -> None:
        """Give a sign of life.

        Raises:
            TaskLost: if it comes too late.
        """
        with self.endpoint.calls():
            answer = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        if not answer.success:
            raise TaskLost(f"{self.endpoint.address} has given up the task")

    def end(self, problem: str = "") -> None:
        """End the task, well or with a problem."""
        status = "failed" if problem else "completed"
        with self.endpoint.calls():
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=problem))

    def send(self, message: Message, node: int, run: int) -> str:
        """Send a message; its objects that are not there yet go with it, in chunks.

        Args:
            message: to send; it gets its id.
            node: number of the node that sends it.
            run: number of the run that it belongs to.

        Raises:
            Refused: if it is not taken.
        """
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            bare = message_to_proto(remove_content_from_message(message))
            request = PushAppMessagesRequest(messages_list=[bare], message_object_trees=[tree])
            with self.endpoint.calls():
                answer = self._client.PushMessages(request)
            [known] = answer.message_ids
            if not known:
                raise Refused(f"{self.endpoint.address} does not take the message")
            missing = set(answer.objects_to_push)
            for name in [name for name in objects if name in missing]:
                self._put(name, objects[name].deflate(), answer.session_id, (node, run))
        return str(known)

    def _put(self, name: str, content: bytes, session: str, where: tuple[int, int]) -> None:
        node, run = where
        request = PushObjectRequest(
            node=Node(node_id=node),
            run_id=run,
            object_id=name,
            object_content=content,
            session_id=session,
        )
        with self.endpoint.calls():
            if not self._client.PushObject(request).stored:
                raise Refused(f"{self.endpoint.address} does not take a part of the message")

    def waiting(self, ids: Sequence[str] = ()) -> list[tuple[Metadata, ObjectTree]]:
        """Return the messages that wait for us, without their content; each is told of once.

        Args:
            ids: of the messages whose replies are meant; for a SuperNode's task none.
        """
        with self.endpoint.calls():
            answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=ids))
        pairs = zip(answer.messages_list, answer.message_object_trees, strict=True)
        return [(proto.metadata, tree) for proto, tree in pairs]

    def fetch(
        self,
        tree: ObjectTree,
        node: int,
        run: int,
        most_bytes: int,
        wanted: Wanted = patiently,
    ) -> Message:
        """Return a message with its content, as soon as all of that has arrived.

        Args:
            tree: what it consists of.
            node: number of the node that it is for.
            run: number of the run that it belongs to.
            most_bytes: of its objects together.
            wanted: whether its next part is still, after so many seconds.

        Raises:
            Lost: if it does not arrive.
            Unreadable: if it is too large (TooLarge), or is no message.
        """
        contents: dict[str, bytes] = {}
        room = most_bytes
        for one in iterate_object_tree(tree):
            if one.object_id not in contents:
                request = PullObjectRequest(
                    node=Node(node_id=node), run_id=run, object_id=one.object_id
                )
                contents[one.object_id] = self._get(request, wanted)
                room -= len(contents[one.object_id])
                if room < 0:
                    raise TooLarge(f"it is larger than {most_bytes} bytes")
        confirmed = ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=run, message_object_id=tree.object_id
        )
        with self.endpoint.calls():
            self._client.ConfirmMessageReceived(confirmed)
        return inflated(tree.object_id, contents, most_bytes)

    def _get(self, request: PullObjectRequest, wanted: Wanted) -> bytes:
        began = time.monotonic()
        while wanted(waited_s := time.monotonic() - began):
            with self.endpoint.calls():
                answer = self._client.PullObject(request)
            if not answer.object_found:
                raise Lost("a part of it is there no more")
            if answer.object_available:
                return answer.object_content
            time.sleep(pause_after(waited_s, _WAIT_S, _LONGEST_WAIT_S))
        raise Lost("a part of it did not arrive")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _reason(response: httpx.Response) -> str:
    """Return what a refusal says."""
    error = FlowerError.from_json(response.text)
    return f"{error.message} (HTTP {response.status_code})" if error else str(response)
