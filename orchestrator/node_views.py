"""Sites' nodes as people, and programs, see them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchestrator.node_keys import is_online
from orchestrator.nodes import standing
from storage.ledger import ClientRecord, Ledger
from storage.nodes import NodeRecord, Sighting
from storage.records import now

_SOON = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, and what is seen of it.

    Attributes:
        record: what was last said of it.
        sighting: what the SuperLink sees of it, or None if it never did.
        moment: when, UTC.
    """

    record: NodeRecord
    sighting: Sighting | None
    moment: datetime

    @property
    def standing(self) -> str:
        """Whether it is let in, in a word."""
        return standing(self.record, self.moment)

    @property
    def online(self) -> bool:
        """Whether it was seen lately."""
        return is_online(self.sighting, self.moment)

    @property
    def versions(self) -> tuple[str, str]:
        """Of its weft and its Flower, as it last said."""
        said = self.record.document["statement"]
        seen = self.sighting
        return (seen and seen.weft) or said["weft"], (seen and seen.flwr) or said["flwr"]

    @property
    def state(self) -> str:
        """Its standing, and what its owner or ours should do about it soon."""
        left = self.record.expires_at - self.moment
        soon = f", {max(0, left.days)} days left" if timedelta() < left < _SOON else ""
        trouble = f": {self.sighting.problem}" if self.sighting and self.sighting.problem else ""
        let_in = self.standing == "enabled"
        return f"{self.standing}{soon}{trouble}" if let_in else self.standing

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        record, (weft, flwr) = self.record, self.versions
        seen = self.sighting.seen_at if self.sighting else None
        statement = record.document["statement"]
        return {
            "name": record.name,
            "status": self.standing,
            "fingerprint": record.fingerprint,
            "expires_at": record.expires_at.isoformat(),
            "online": self.online,
            "seen_at": None if seen is None else seen.isoformat(),
            "weft": weft,
            "flwr": flwr,
            "problem": self.sighting.problem if self.sighting else None,
            "labels": {**statement["labels"], **record.labels},
            "budgets": {name: list(budget) for name, budget in record.budgets.items()},
            "data": sorted(statement["data"]),
            "models": statement["models"],
        }


def views(ledger: Ledger, clients: Collection[str] | None = None) -> dict[str, NodeView]:
    """Return the nodes of clients that have one, by client: of these, or of all."""
    seen, moment = ledger.nodes.sightings(), now()
    found = ledger.nodes.of_clients(clients)
    return {name: NodeView(one, seen.get(one.name), moment) for name, one in found.items()}


def view(ledger: Ledger, record: NodeRecord) -> NodeView:
    """Return one node."""
    return NodeView(record, ledger.nodes.sightings().get(record.name), now())


def history_json(history: Sequence[NodeRecord]) -> list[dict[str, Any]]:
    """Return what was ever said of a node, as JSON."""
    return [
        {
            "status": word.status,
            "fingerprint": word.fingerprint,
            "who": word.who,
            "why": word.why,
            "at": word.created_at.isoformat(),
        }
        for word in history
    ]


def clients_table(records: Sequence[ClientRecord], nodes: Mapping[str, NodeView]) -> Table:
    """Return registered clients, those at sites with their nodes."""
    columns = ("client", "data", "examples", "population", "budget", "labels")
    table = Table(*columns, *(("node", "online", "last seen", "weft") if nodes else ()))
    for c in records:
        budget = f"ε {c.epsilon:g} (δ {c.delta:g})" if c.epsilon is not None else "none"
        labels = ", ".join(f"{k}={v}" for k, v in sorted(c.labels.items()))
        size = "-" if c.num_examples is None else str(c.num_examples)
        texts = [c.name, c.data, size, c.population, budget, labels]
        if nodes:
            texts += _of_node(nodes.get(c.name))
        table.add_row(*(escape(text) for text in texts))
    return table


def node_table(shown: NodeView, history: Sequence[NodeRecord]) -> Table:
    """Return one node's facts, and what was ever said of it, newest first."""
    table = Table(show_header=False, box=None, pad_edge=False)
    facts = shown.to_json()
    rows = {
        "node": shown.record.name,
        "standing": shown.state,
        "online": f"{'yes' if shown.online else 'no'}, last seen {_when(shown.sighting)}",
        "key": shown.record.fingerprint,
        "good until": f"{shown.record.expires_at:%Y-%m-%d %H:%M} UTC",
        "versions": f"weft {facts['weft']}, flwr {facts['flwr']}",
        "data": ", ".join(facts["data"]),
        "lets spend": ", ".join(
            f"{name} ε {epsilon:g} (δ {delta:g})"
            for name, (epsilon, delta) in sorted(shown.record.budgets.items())
        )
        or "no bound",
        "labels": ", ".join(f"{k}={v}" for k, v in sorted(facts["labels"].items())) or "-",
        "base models": ", ".join(digest[:12] for digest in facts["models"]) or "-",
    }
    for key, text in rows.items():
        table.add_row(f"[bold]{key}[/]", escape(text))
    for word in history:
        why = f": {word.why}" if word.why else ""
        line = f"{word.created_at:%Y-%m-%d %H:%M} {word.status} by {word.who}{why}"
        table.add_row("", escape(line), style="dim")
    return table


def _of_node(shown: NodeView | None) -> list[str]:
    if shown is None:
        return ["-", "-", "-", "-"]
    name, state = shown.record.name, shown.state
    where = name if state == "enabled" else f"{name} ({state})"
    return [where, "yes" if shown.online else "no", _when(shown.sighting), shown.versions[0]]


def _when(sighting: Sighting | None) -> str:
    seen = sighting.seen_at if sighting else None
    return "never" if seen is None else f"{seen:%Y-%m-%d %H:%M:%S} UTC"
