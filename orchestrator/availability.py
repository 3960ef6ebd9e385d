"""Who is there: not whose node is shut out; and, with ``cohort.available_only``, who else is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from clients.data import is_elsewhere, is_there
from orchestrator.faults import client_fault
from orchestrator.node_keys import is_online
from orchestrator.nodes import barred
from orchestrator.plan import Plan
from storage.ledger import Ledger
from storage.records import now


def absent(
    plan: Plan,
    round_: int,
    ledger: Ledger,
    log: Callable[[str, Mapping[str, Any]], None] = lambda kind, data: None,
) -> set[str]:
    """Return the participants that cannot be asked in a round.

    Whose node is not let in never can, and the log says why. Where a cohort is of those who are
    there: a simulated client is, unless ``faults`` say that it is away. A registered one is while
    it is registered and, where workers read this machine's disk, while its data set is there; one
    at a site, unless its node was seen, and not lately.
    """
    config = plan.config
    at_sites = {p.name for p in plan.participants if is_elsewhere(p.data.uri)}
    shut = barred(ledger, at_sites) if at_sites else {}
    if shut:
        log("barred", {"round": round_, "clients": shut})
    if not config.cohort.available_only:
        return set(shut)
    if config.clients.simulate is not None:
        faults, names = config.faults, (p.name for p in plan.participants)
        return {n for n in names if faults and client_fault(faults, round_, n) == "away"}
    registered, here = ledger.client_names(), config.backend.address is None
    away = _offline(ledger, at_sites) if at_sites else set()

    def gone(uri: str) -> bool:
        return here and not is_elsewhere(uri) and not is_there(uri)

    people = plan.participants
    lost = {p.name for p in people if p.name not in registered or gone(p.data.uri)}
    return lost | away | set(shut)


def _offline(ledger: Ledger, clients: Collection[str]) -> set[str]:
    """Return the clients whose node a SuperLink knows, and does not see now."""
    seen, moment = ledger.nodes.sightings(), now()
    nodes = ledger.nodes.of_clients(clients)
    return {
        client
        for client, node in nodes.items()
        if node.name in seen and not is_online(seen[node.name], moment)
    }
