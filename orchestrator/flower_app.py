"""Weft as a Flower app, by Flower's documented interface alone: for a Flower with other internals.

Where weft starts a Flower run it drives it from outside (:mod:`orchestrator.backends.superlink`).
Where Flower starts it (``flwr run``), the same federation runs in its ServerApp over the Grid that
it is handed, and nodes answer in its ClientApp, a process for each message. What is lost is that a
coordinator that dies is taken over in place: the run is resumed from its last commit.

``home`` and ``run`` of the run's configuration name a weft home and a run in it that nobody drives;
``node`` of a node's configuration is its node.yaml.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.flower import order_of, order_record, reply_of, reply_record
from clients.orders import BadReply, Order
from orchestrator.backends.superlink import (
    Arrived,
    Endpoint,
    Mishap,
    Node,
    Refused,
    Task,
    TaskLost,
    Wanted,
    canonical_key,
)

client, server = ClientApp(), ServerApp()
_GRID, _TASK = Endpoint("grid"), Task("", 0, 0)


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Answer an order as the resident process of a node would."""
    from clients.node.resident import Resident
    from clients.node.settings import load_settings

    settings = load_settings(Path(str(context.node_config["node"])))
    return Message(
        reply_record(Resident(settings).answer(order_of(message.content))), reply_to=message
    )


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Drive a run of a weft home to its end, with the nodes of the Grid as its sites."""
    from orchestrator.backends.mixed import MixedBackend
    from orchestrator.coordinator import Driving, claim, drive, make_backend, planned
    from orchestrator.sites import sites_backend
    from orchestrator.workspace import open_workspace

    workspace = open_workspace(str(context.run_config["home"]))
    record = workspace.ledger.run(str(context.run_config["run"]))
    plan = planned(workspace.ledger, record)
    sites = sites_backend(plan, workspace.ledger, workspace.home, GridLink(grid))
    backend = MixedBackend(make_backend(plan.config, len(plan.participants)), sites)
    try:
        drive(workspace, claim(workspace, record), lambda kind, data: None, Driving(backend))
    finally:
        backend.close()
        workspace.close()


@dataclass(frozen=True, slots=True)
class GridLink:
    """The nodes of a Grid; see :class:`orchestrator.backends.sites_line.Link`.

    Attributes:
        grid: as Flower hands it to a ServerApp.
        endpoint: for the records; a Grid has none.
    """

    grid: Grid
    endpoint: Endpoint = _GRID

    def nodes(self) -> list[Node]:
        """Return the nodes that are online: a Grid knows no others.

        One without a key that can be read is nobody's: the ledger knows nodes by their keys.
        """
        now, found = time.time(), []
        for one in self.grid.get_nodes():
            try:
                key = canonical_key(one.public_key)
            except (ValueError, UnsupportedAlgorithm):
                continue
            at = one.last_activated_at
            activated = datetime.fromisoformat(at).timestamp() if at else 0.0
            found.append(Node(one.node_id, key, one.name, "online", activated, now))
        return found

    def claim(self) -> GridClaim:
        """Return the run that the Grid is of."""
        return GridClaim(self.grid)

    def attach(self, task: Task) -> GridClaim:
        """Refuse: a ServerApp that died is another run.

        Raises:
            TaskLost: always.
        """
        raise TaskLost("a Grid is handed out once")

    def close(self) -> None:
        """Nothing to close: the Grid is Flower's."""


@dataclass(slots=True)
class GridClaim:
    """The run of a Grid; see :class:`orchestrator.backends.sites_line.Claimed`."""

    grid: Grid
    task: Task = _TASK
    lost: bool = False
    _came: dict[str, Message] = field(default_factory=dict)

    def push(self, node: int, order: Order, deadline: float, group: str) -> str:
        """Send an order to a node and return the message's id.

        Raises:
            Refused: if the Grid does not take it.
        """
        ttl = max(deadline - time.time(), 0.001)
        message = Message(order_record(order), node, "train", ttl=ttl, group_id=group)
        known = list(self.grid.push_messages([message]))
        if not known or not known[0]:
            raise Refused("Flower does not take the message")
        return known[0]

    def replies(self, ids: Iterable[str]) -> list[Arrived]:
        """Return what has come in reply to messages."""
        found = {m.metadata.reply_to_message_id: m for m in self.grid.pull_messages(sorted(ids))}
        self._came |= found
        return [Arrived(to) for to in found]

    def fetch(self, arrived: Arrived, most_bytes: int, wanted: Wanted) -> bytes | Mishap:
        """Return what a reply says.

        Raises:
            BadReply: if it is none, or too large.
        """
        message = self._came.pop(arrived.to)
        if message.has_error():
            return Mishap(message.error.code, message.error.reason or "")
        data = reply_of(message.content)
        if len(data) > most_bytes:
            raise BadReply(f"it is larger than {most_bytes} bytes")
        return data

    def finish(self) -> None:
        """Nothing to end: the run ends with the ServerApp."""

    def close(self) -> None:
        """Nothing to close: the Grid is Flower's."""
