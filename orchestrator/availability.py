"""Who is there, where a cohort is of those who are (``cohort.available_only``)."""

from __future__ import annotations

from clients.data import is_there
from orchestrator.faults import client_fault
from orchestrator.plan import Plan
from storage.ledger import Ledger


def absent(plan: Plan, round_: int, ledger: Ledger) -> set[str]:
    """Return the participants that cannot be asked in a round.

    A simulated client is there unless ``faults`` say that it is away. A registered one is there
    while it is registered and, where workers read this machine's disk, while its data set is there.
    """
    config = plan.config
    if not config.cohort.available_only:
        return set()
    if config.clients.simulate is not None:
        faults, names = config.faults, (p.name for p in plan.participants)
        return {n for n in names if faults and client_fault(faults, round_, n) == "away"}
    registered, here = ledger.client_names(), config.backend.address is None
    return {
        p.name
        for p in plan.participants
        if p.name not in registered or (here and not is_there(p.data.uri))
    }
