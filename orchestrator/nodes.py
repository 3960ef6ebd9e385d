"""Letting sites' nodes in, and shutting them out: what the coordinator's people decide.

A node is known by its key. Everything that is believed of a site stands in a join file that its key
signed: nobody here writes where its data lie, or lets it spend more than it said.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NoReturn

from clients.node.joining import Join, Offer, read_join
from orchestrator.registering import ClientWithdrew
from storage.ledger import ClientRecord, Ledger, UnknownClient
from storage.nodes import NodeRecord, NodeStatus, UnknownNode
from storage.records import now
from storage.refs import did_you_mean, quoted


class NodeRefused(ValueError):
    """What is asked of a node cannot be done as it stands."""


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a node is let in.

    Attributes:
        pending: whether somebody else is to approve it.
        labels: the operator's, over the site's own.
        days: for which its key is good at most; None is as long as the site says.
        fingerprint: that its key must have, as the site told it by another way; None for any.
        why: for the record.
    """

    pending: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    days: int | None = None
    fingerprint: str | None = None
    why: str = ""


def admit(ledger: Ledger, data: bytes, terms: Terms) -> NodeRecord:
    """Let a node in that asks by a join file, or take what one that is known says newly of itself.

    One that is disabled stays so, and one that is pending too.

    Raises:
        BadJoin: if the file cannot be believed.
        NodeRefused: if the node has another key, or said something newer before.
        KeyTaken, PopulationTaken: if its key or its data's population is somebody else's.
        ClientWithdrew, ClientExists, BadClient, BadBudget: if a data set can be no client.
    """
    moment = now()
    join = read_join(data, moment)
    said = join.statement
    _check_fingerprint(join.key.fingerprint, terms.fingerprint)
    if join.previous is not None:
        raise NodeRefused(
            f"this join file brings node {said.name!r} a new key; use: weft clients rotate --join"
        )
    known = ledger.nodes.find(said.name)
    status: NodeStatus = "pending" if terms.pending else "enabled"
    if known is not None and known.status != "removed":
        if known.fingerprint != join.key.fingerprint:
            raise NodeRefused(
                f"node {said.name!r} has another key ({known.fingerprint}); a site changes its key "
                "with weft node rotate. If it has lost the old one: weft clients remove "
                f"{said.name}, then add it again"
            )
        _refuse_older(known, join)
        status = known.status
    expires = said.expires
    if terms.days is not None:
        expires = min(expires, moment + timedelta(days=terms.days))
    labels = terms.labels
    if known is not None and known.status != "removed":
        labels = {**known.labels, **labels}
    record = NodeRecord(
        name=said.name,
        number=known.number + 1 if known else 1,
        status=status,
        public_key=join.key.text,
        fingerprint=join.key.fingerprint,
        expires_at=expires,
        labels=labels,
        budgets=said.budgets,
        document=join.document,
        who=getpass.getuser(),
        why=terms.why,
    )
    return _put(ledger, record, join)


def rotate(ledger: Ledger, data: bytes, fingerprint: str | None = None) -> NodeRecord:
    """Take a node's new key, which its old one vouches for; the old one is trusted no more.

    Raises:
        BadJoin: if the file cannot be believed.
        NodeRefused: if it is not the node's own key that vouches for the new one.
        UnknownNode: if there is no such node.
        KeyTaken: if the new key is somebody else's, or was the node's before.
    """
    join = read_join(data, now())
    _check_fingerprint(join.key.fingerprint, fingerprint)
    name = join.statement.name
    known = _present(ledger, name)
    if join.previous is None or join.previous.fingerprint != known.fingerprint:
        raise NodeRefused(
            f"the new key of node {name!r} is vouched for by its old one, {known.fingerprint}, and "
            "here it is not; the site makes such a file with: weft node rotate"
        )
    _refuse_older(known, join)
    record = replace(
        _next(known, known.status, f"instead of {known.fingerprint}"),
        public_key=join.key.text,
        fingerprint=join.key.fingerprint,
        expires_at=join.statement.expires,
        budgets=join.statement.budgets,
        document=join.document,
    )
    return _put(ledger, record, join)


def approve(ledger: Ledger, name: str, fingerprint: str | None = None) -> NodeRecord:
    """Let in a node that waits for it.

    Raises:
        UnknownNode: if there is none.
        NodeRefused: if it does not wait, or its key is another than was expected.
        BadJoin: if its join file has expired since.
        PopulationTaken, ClientWithdrew, ClientExists: as :func:`admit`.
    """
    known = _present(ledger, name)
    if known.status != "pending":
        raise NodeRefused(f"node {name!r} is {known.status}, and waits for nobody's approval")
    _check_fingerprint(known.fingerprint, fingerprint)
    return _put(ledger, _next(known, "enabled", ""), _join_of(known))


def disable(ledger: Ledger, name: str, why: str = "") -> NodeRecord:
    """Shut a node out until it is enabled again; its clients stay registered, and are not asked.

    Raises:
        UnknownNode: if there is none.
        NodeRefused: if it is not let in.
    """
    known = _node_of_either(ledger, name)
    if known.status != "enabled":
        raise NodeRefused(f"node {known.name!r} is {known.status}, and cannot be disabled")
    return _put(ledger, _next(known, "disabled", why))


def enable(ledger: Ledger, name: str, why: str = "") -> NodeRecord:
    """Let a node in again that was shut out.

    Raises:
        UnknownNode: if there is none.
        NodeRefused: if it was not, or its key has expired.
    """
    known = _node_of_either(ledger, name)
    if known.status != "disabled":
        wait = f"; let it in with: weft clients approve {known.name}"
        hint = wait if known.status == "pending" else ""
        raise NodeRefused(f"node {known.name!r} is {known.status}, and cannot be enabled{hint}")
    if known.expires_at <= now():
        raise NodeRefused(
            f"the key of node {known.name!r} expired on {known.expires_at:%Y-%m-%d}; the site "
            "makes a new join file with weft node join: give it to weft clients add --join first"
        )
    return _put(ledger, _next(known, "enabled", why))


def remove(ledger: Ledger, name: str, why: str = "") -> NodeRecord | None:
    """Forget a node and its clients, and never trust its key again; or forget one client alone.

    What was spent of its data stays for ever. Where a node and a client have one name, it is the
    node.

    Returns:
        The node's last record; None if it was a client.

    Raises:
        UnknownClient: if there is neither.
    """
    known = ledger.nodes.find(name)
    if known is None or known.status == "removed":
        ledger.remove_client(name)
        return None
    record = _next(known, "removed", why)
    ledger.nodes.put(record, [])
    return record


def standing(record: NodeRecord, moment: datetime) -> str:
    """Return whether a node is let in, in a word: its status, or ``expired``."""
    expired = record.status == "enabled" and record.expires_at <= moment
    return "expired" if expired else record.status


def barred(ledger: Ledger, clients: Collection[str]) -> dict[str, str]:
    """Return which of some sites' clients may not be asked, each with a sentence that says why.

    A client that is nobody's, registered by hand, is not among them.
    """
    nodes, moment = ledger.nodes.of_clients(clients), now()
    found = {}
    for client, node in sorted(nodes.items()):
        state = standing(node, moment)
        if state == "expired":
            found[client] = f"the key of node {node.name} expired on {node.expires_at:%Y-%m-%d}"
        elif state != "enabled":
            why = f": {node.why}" if node.why else ""
            found[client] = (
                f"node {node.name} is {state} since {node.created_at:%Y-%m-%d} by {node.who}{why}"
            )
    for client in sorted(set(clients) - ledger.client_names()):
        found[client] = f"client {client} is registered no more"
    return found


def offered(join: Join, labels: Mapping[str, str]) -> list[ClientRecord]:
    """Return the clients that a join file's data sets are.

    Args:
        join: the file.
        labels: the operator's, over the site's own.
    """
    said = join.statement
    return [
        ClientRecord(
            name=join.client(name),
            data=f"site:{name}",
            population=offer.population,
            num_examples=offer.examples,
            epsilon=offer.epsilon,
            delta=offer.delta,
            labels={**said.labels, **labels},
            public=offer.public,
            node=said.name,
            holdout=_holdout(offer),
        )
        for name, offer in sorted(said.data.items())
    ]


def units_of(ledger: Ledger, client: str, column: str) -> int | None:
    """Return of how many units a site's client says that its data are; None if of no such ones.

    Args:
        ledger: which knows the node's join file.
        client: its name.
        column: that says whose each record is.
    """
    node = ledger.nodes.of_clients([client]).get(client)
    if node is None:
        return None
    data_set = ledger.client(client).data.removeprefix("site:")
    offer = node.document["statement"]["data"].get(data_set, {})
    return offer.get("units") if offer.get("unit") == column else None


def _holdout(offer: Offer) -> str | None:
    """Return what a data set holds out as clients declare it, by its unit as nodes do."""
    if not offer.holdout:
        return None
    return f"{offer.holdout!r}:{offer.unit}" if offer.unit else repr(offer.holdout)


def _put(ledger: Ledger, record: NodeRecord, join: Join | None = None) -> NodeRecord:
    """Write a record; with a join file also the clients that it offers, where they are let in."""
    clients: Sequence[ClientRecord] | None = None
    if join is not None:
        clients = [] if record.status == "pending" else offered(join, record.labels)
        withdrawn = ledger.withdrawals.names()
        for client in clients:
            if client.name in withdrawn:
                raise ClientWithdrew(
                    f"a client called {client.name!r} withdrew, and is used no more; the site can "
                    "take part under another name"
                )
    ledger.nodes.put(record, clients)
    return record


def _next(known: NodeRecord, status: NodeStatus, why: str) -> NodeRecord:
    return replace(
        known,
        number=known.number + 1,
        status=status,
        who=getpass.getuser(),
        why=why,
        created_at=now(),
    )


def _join_of(record: NodeRecord) -> Join:
    return read_join(json.dumps(record.document).encode(), now())


def _present(ledger: Ledger, name: str) -> NodeRecord:
    found = ledger.nodes.get(name)
    if found.status == "removed":
        _unknown(ledger, name)
    return found


def _node_of_either(ledger: Ledger, name: str) -> NodeRecord:
    """Return the node that is called this, or that has the client that is."""
    found = ledger.nodes.find(name)
    if found is not None and found.status != "removed":
        return found
    try:
        client = ledger.client(name)
    except UnknownClient:
        _unknown(ledger, name)
    if client.node is None:
        raise NodeRefused(
            f"client {name!r} is at no node, and only nodes are disabled; weft clients remove "
            "forgets a client"
        )
    return ledger.nodes.get(client.node)


def _unknown(ledger: Ledger, name: str) -> NoReturn:
    known = [one.name for one in ledger.nodes.all() if one.status != "removed"]
    raise UnknownNode(
        f"no node is called {quoted(name)}{did_you_mean(name, known)}; weft clients list shows them"
    )


def _check_fingerprint(has: str, expected: str | None) -> None:
    if expected is not None and expected.strip() != has:
        raise NodeRefused(
            f"the key is {has}, and {quoted(expected)} was expected; ask the site which is right, "
            "and let nobody in before"
        )


def _refuse_older(known: NodeRecord, join: Join) -> None:
    """Refuse a join file that is older than the one that is known: it may be an old promise."""
    before, made = datetime.fromisoformat(known.document["statement"]["made"]), join.statement.made
    if made < before or (made == before and join.document != known.document):
        raise NodeRefused(
            f"this join file of node {known.name!r} was made at {made:%Y-%m-%d %H:%M:%S}, and one "
            f"of {before:%Y-%m-%d %H:%M:%S} is known; the site makes another with: weft node join"
        )
