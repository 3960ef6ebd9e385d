"""What a site's owner sees: what ran, what was sent, and what it cost, from the site's own ledger.

Needs no library but the standard one and node.yaml's, so that it is there at once. An epsilon is
the bound that the ledger noted with the charge; the tight one is computed when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clients.accounting import IncomposableSpends, epsilon
from clients.charges import Charge
from clients.node.ledger import ALL, FILE, Ledger
from clients.node.settings import Settings
from strategies.spends import PrivacySpend, of_a_share

_LAST = 20  # answers that are shown

_RUNS = """
SELECT r.run, r.client, r.population, r.name, r.strategy, r.protection, r.began,
    (SELECT count(DISTINCT a.round) FROM answers a WHERE a.run = r.run AND a.client = r.client
        AND a.outcome = 'update') AS updates,
    (SELECT count(*) FROM answers a WHERE a.run = r.run AND a.client = r.client
        AND a.outcome = 'evaluation') AS evaluations,
    (SELECT count(*) FROM answers a WHERE a.run = r.run AND a.client = r.client
        AND a.outcome = 'refusal') AS refusals,
    (SELECT coalesce(sum(a.bytes), 0) FROM answers a WHERE a.run = r.run AND a.client = r.client)
        AS bytes,
    b.epsilon, b.delta
FROM runs r LEFT JOIN bounds b ON b.run = r.run AND b.population = r.population
ORDER BY r.began
"""
_ANSWERS = """
SELECT run, client, round, action, began, ended, outcome, reason, bytes, sha256
FROM answers ORDER BY number DESC LIMIT ?
"""
_UNPROTECTED = "SELECT count(*) AS runs FROM runs WHERE population = ? AND protection = 'none'"


def status(settings: Settings, exact: bool = False) -> dict[str, Any]:
    """Return what a node did, as JSON.

    Args:
        settings: of the node.
        exact: compute each epsilon by the tight accountant, which takes seconds and imports much.

    Raises:
        clients.node.ledger.LedgerUnavailable: if the ledger cannot be read.
    """
    there = (settings.state / FILE).exists()
    ledger = Ledger(settings.state) if there else None
    return {
        "name": settings.name,
        "superlink": settings.superlink,
        "data": [_data_set(settings, name, ledger, exact) for name in settings.data],
        "runs": [_run(row, ledger, exact) for row in ledger.rows(_RUNS)] if ledger else [],
        "answers": ledger.rows(_ANSWERS, _LAST) if ledger else [],
    }


def _data_set(settings: Settings, name: str, ledger: Ledger | None, exact: bool) -> dict[str, Any]:
    """Return what was spent of a data set's population in all."""
    data, population = settings.data[name], settings.population(name)
    found: Mapping[str, Any] = {"epsilon": 0.0, "delta": data.delta}
    unprotected = 0
    if ledger is not None:
        query = "SELECT epsilon, delta FROM bounds WHERE run = ? AND population = ?"
        found = next(iter(ledger.rows(query, ALL, population)), found)
        [row] = ledger.rows(_UNPROTECTED, population)
        unprotected = row["runs"]
    return {
        "data_set": name,
        "client": settings.client(name),
        "population": population,
        "public": data.public,
        "budget": data.epsilon,
        **_spent(found, ledger, population, None, exact),
        "unprotected_runs": unprotected,
    }


def _run(row: Mapping[str, Any], ledger: Ledger, exact: bool) -> dict[str, Any]:
    return {**row, **_spent(row, ledger, row["population"], row["run"], exact)}


def _spent(
    noted: Mapping[str, Any], ledger: Ledger | None, population: str, run: str | None, exact: bool
) -> dict[str, Any]:
    """Return the epsilon of a run, or of all, and its delta; None where there is none to give.

    Where a sum's noise is made of shares, also what holds against whoever sees this client's
    update by itself, as the coordinator does.
    """
    value, delta, against = noted["epsilon"], noted["delta"], None
    if exact and ledger is not None and delta is not None:
        charges = [c for c in ledger.charges(population) if run in (None, c.run)]
        value = _composed([c.spend for c in charges], delta)
        shared = _shared(ledger, population, charges)
        against = _composed(shared, delta) if shared else None
    found = {"epsilon": value if value is None or math.isfinite(value) else None, "delta": delta}
    return found if against is None else {**found, "epsilon_against_coordinator": against}


def _shared(ledger: Ledger, population: str, charges: Sequence[Charge]) -> Sequence[PrivacySpend]:
    """Return the spends whose noise is made of shares, each as its own share alone hides it."""
    query = "SELECT event, shares FROM spends WHERE population = ? AND shares > 0"
    shares = {row["event"]: row["shares"] for row in ledger.rows(query, population)}
    return [of_a_share(c.spend, shares[c.event]) for c in charges if c.event in shares]


def _composed(spends: Sequence[PrivacySpend], delta: float) -> float | None:
    try:
        return epsilon(spends, delta)
    except IncomposableSpends:
        return None
