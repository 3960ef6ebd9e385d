"""``weft clients``, as far as it is about sites' nodes: letting them in, shutting them out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.terminal import out, print_json, workspace_here

if TYPE_CHECKING:
    from orchestrator.nodes import Terms
    from storage.nodes import NodeRecord

Why = Annotated[str, typer.Option(help="For the record.")]
Fingerprint = Annotated[
    str | None, typer.Option(help="SHA256:…, as the site told it by another way.")
]
JoinFile = Annotated[Path, typer.Option("--join", help="The file that the site sent.")]


def admit(file: Path, terms: Terms) -> None:
    """Let a node in by its join file, or have it wait for approval; print which."""
    from orchestrator import nodes

    ledger = workspace_here().ledger
    record = nodes.admit(ledger, file.read_bytes(), terms)
    _print_standing(record)
    _print_clients(ledger, record)


def approve(node: str, fingerprint: Fingerprint = None) -> None:
    """Let in a site's node that waits for it, if its key is the one that the site told."""
    from orchestrator import nodes

    ledger = workspace_here().ledger
    record = nodes.approve(ledger, node, fingerprint)
    _print_standing(record)
    _print_clients(ledger, record)


def disable(
    name: Annotated[str, typer.Argument(help="A node, or its client.")], why: Why = ""
) -> None:
    """Shut a site's node out, at once, until it is enabled again; nobody asks it any more."""
    from orchestrator import nodes

    _print_standing(nodes.disable(workspace_here().ledger, name, why))


def enable(
    name: Annotated[str, typer.Argument(help="A node, or its client.")], why: Why = ""
) -> None:
    """Let a site's node in again that was shut out."""
    from orchestrator import nodes

    _print_standing(nodes.enable(workspace_here().ledger, name, why))


def remove(
    name: Annotated[str, typer.Argument(help="A node, with all its clients, or one client.")],
    why: Why = "",
) -> None:
    """Forget a client, or a site's node, whose key is never trusted again; spends stay for ever."""
    from orchestrator import nodes

    record = nodes.remove(workspace_here().ledger, name, why)
    what = name if record is None else f"node {name}, its clients and its key"
    out.print(f"removed {what}", highlight=False, markup=False)


def rotate(join: JoinFile, fingerprint: Fingerprint = None) -> None:
    """Take a site's new key, which its old one vouches for; the old one is shut out at once."""
    from orchestrator import nodes

    _print_standing(nodes.rotate(workspace_here().ledger, join.read_bytes(), fingerprint))


def show_node(ledger: Any, name: str, as_json: bool) -> bool:
    """Print a node, if one is called this; return whether one is."""
    from orchestrator import node_views

    record = ledger.nodes.find(name)
    if record is None:
        return False
    shown, history = node_views.view(ledger, record), ledger.nodes.history(name)
    if as_json:
        print_json({**shown.to_json(), "history": node_views.history_json(history)})
    else:
        out.print(node_views.node_table(shown, history))
    return True


def list_pending(as_json: bool) -> None:
    """Print the nodes that wait for approval."""
    from orchestrator import node_views

    ledger = workspace_here().ledger
    found = [node_views.view(ledger, one) for one in ledger.nodes.all() if one.status == "pending"]
    if as_json:
        print_json([one.to_json() for one in found])
        return
    for one in found:
        line = f"{one.record.name}  {one.record.fingerprint}  {', '.join(one.to_json()['data'])}"
        out.print(line, highlight=False, markup=False)
    if not found:
        out.print("no node waits for approval")


def _print_standing(record: NodeRecord) -> None:
    until = f"until {record.expires_at:%Y-%m-%d}"
    line = f"node {record.name} is {record.status}, key {record.fingerprint} {until}"
    out.print(line, highlight=False, markup=False)
    if record.status == "pending":
        line = f"when the site told you this key by another way: weft clients approve {record.name}"
        out.print(line, highlight=False, markup=False)


def _print_clients(ledger: Any, record: NodeRecord) -> None:
    for client in ledger.clients():
        if client.node == record.name:
            limit = client.epsilon
            budget = "none" if limit is None else f"ε {limit:g} (δ {client.delta:g})"
            line = f"client {client.name}: {client.num_examples} examples, budget {budget}"
            out.print(line, highlight=False, markup=False)
