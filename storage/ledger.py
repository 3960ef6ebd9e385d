"""The ledger: registered clients, privacy spends, runs and their events.

Everything is durable when the call that writes it returns. Nothing in it is secret.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, insert, select, update

from storage.canonical import canonical_json, read_json
from storage.database import lock, writing
from storage.membership import is_among
from storage.nodes import Nodes
from storage.queue import RunQueue
from storage.records import (
    ClientRecord,
    Event,
    Queueing,
    RunRecord,
    SpendRow,
    Status,
    Wish,
)
from storage.registry import (
    BadBudget,
    BadClient,
    ClientExists,
    Registry,
    UnknownClient,
    UnknownPopulation,
    population_lock,
)
from storage.relations import RELATING, Relations, relatives
from storage.runs import (
    AmbiguousRun,
    BadLabels,
    BadStatus,
    LeaseLost,
    RunChanged,
    RunExists,
    RunFields,
    RunLog,
    UnknownRun,
)
from storage.schema import spends
from storage.unprotected import UnprotectedRuns
from storage.withdrawals import Withdrawals

__all__ = [
    "AmbiguousRun",
    "BadBudget",
    "BadClient",
    "BadLabels",
    "BadStatus",
    "ClientExists",
    "ClientRecord",
    "Event",
    "LeaseLost",
    "Ledger",
    "Queueing",
    "RunChanged",
    "RunExists",
    "RunFields",
    "RunQueue",
    "RunRecord",
    "SpendConflict",
    "SpendRow",
    "Status",
    "UnknownClient",
    "UnknownPopulation",
    "UnknownRun",
    "UnknownSpend",
    "Wish",
]

Check = Callable[[str, list[SpendRow], list[SpendRow]], None]
"""``check(population, existing, new)`` raises to refuse the ``new`` spends."""


class SpendConflict(ValueError):
    """Two different spends with one event key."""


class UnknownSpend(LookupError):
    """No spend has this event key."""


class Ledger(RunLog, Registry):
    """Clients, their populations' budgets and spends, and the runs with their events.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the adapter store.

    Attributes:
        queue: claims of the runs that wait.
        nodes: sites' nodes, and what is seen of them.
        relations: populations that share records.
        unprotected: runs without DP, by population.
        withdrawals: clients that withdrew.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.queue = RunQueue(engine)
        self.nodes = Nodes(engine)
        self.relations = Relations(engine)
        self.unprotected = UnprotectedRuns(engine)
        self.withdrawals = Withdrawals(engine)

    def record_spend(self, spend: SpendRow) -> bool:
        """Record one spend, whatever was spent before; False if it is recorded already.

        Raises:
            SpendConflict: as :meth:`record_spends_within`.
        """
        return bool(self.record_spends_within([spend], lambda population, existing, new: None))

    def record_spends_within(self, rows: Sequence[SpendRow], check: Check) -> list[SpendRow]:
        """Record all of ``rows`` or, where ``check`` refuses, none; return those that were new.

        Checking and recording are one serialised step for each population and those that share
        records with it: two runs that race cannot together spend what neither could alone. An event
        that is recorded already is not new, so a retry spends once. A void one that comes again
        counts again from now on.

        Args:
            rows: what is about to be spent.
            check: called as ``check(population, existing, new)`` once for every population with
                new rows or relatives' new rows, in order of their names, with what counts against
                its budget (:meth:`spends`), in the order of recording, and what would. It raises to
                refuse, should be quick, and must not use the ledger.

        Raises:
            SpendConflict: if a recorded event was a different spend.
        """
        with writing(self._engine) as connection:
            lock(connection, RELATING, shared=True)
            asked = {row.population for row in rows}
            touched = asked.union(*relatives(connection, asked).values())
            for population in sorted(touched):
                lock(connection, population_lock(population))
            new = _not_recorded(connection, rows)
            shared = relatives(connection, touched)
            for population in sorted(touched):
                counted = {population, *shared.get(population, ())}
                coming = [row for row in new if row.population in counted]
                if coming:
                    check(population, _of_populations(connection, counted), coming)
            _record(connection, new)
        return new

    def void_spend(self, event: str, reason: str) -> None:
        """Say that a recorded spend never happened; it stays in the history and counts no more.

        Raises:
            UnknownSpend: if there is none.
            ValueError: if no reason is given.
        """
        if not reason:
            raise ValueError("a spend is voided for a reason, got none; say why it did not happen")
        with writing(self._engine) as connection:
            changed = connection.execute(
                update(spends).where(spends.c.event == event).values(void=reason)
            )
            if changed.rowcount == 0:
                raise UnknownSpend(f"no spend has the event {event!r}")

    def spends(self, population: str) -> list[SpendRow]:
        """Return what counts against a population's budget, in the order of recording.

        What was spent on it, and on each population that shares records with it.
        """
        with self._engine.connect() as connection:
            shared = relatives(connection, [population])
            return _of_populations(connection, {population, *shared.get(population, ())})

    def spends_of_run(self, run: str) -> list[SpendRow]:
        """Return what a run (by its id) has spent, in the order of recording."""
        with self._engine.connect() as connection:
            return _counting(connection, spends.c.run == run)

    def spent_populations(self) -> set[str]:
        """Return the populations on which anything was ever spent."""
        with self._engine.connect() as connection:
            return set(connection.scalars(select(spends.c.population).distinct()))


def _not_recorded(connection: Connection, rows: Sequence[SpendRow]) -> list[SpendRow]:
    """Return the rows that count only from now on, each once."""
    new: dict[str, SpendRow] = {}
    for given in rows:
        # As it will be read again, so that it can be compared: a tuple, say, comes back as a list.
        parameters = json.loads(canonical_json(given.parameters, "parameters"))
        row = replace(given, parameters=parameters, void=None)
        stored = connection.execute(select(spends).where(spends.c.event == row.event)).first()
        known = _spend(stored) if stored else new.get(row.event)
        if known is not None and replace(known, void=None) != row:
            raise SpendConflict(
                f"the event {row.event!r} is recorded as another spend "
                f"({known.mechanism} {dict(known.parameters)} of {known.population!r}, "
                f"run {known.run!r}, round {known.round}); events must have keys of their own"
            )
        if known is None or known.void is not None:
            new[row.event] = row
    return list(new.values())


def _record(connection: Connection, new: Sequence[SpendRow]) -> None:
    for row in new:
        values = asdict(row) | {"parameters": canonical_json(row.parameters, "parameters")}
        again = update(spends).where(spends.c.event == row.event).values(void=None)
        if connection.execute(again).rowcount == 0:
            connection.execute(insert(spends).values(values))


def _of_populations(connection: Connection, names: Collection[str]) -> list[SpendRow]:
    return _counting(connection, is_among(connection, spends.c.population, sorted(names)))


def _counting(connection: Connection, wanted: ColumnElement[bool]) -> list[SpendRow]:
    query = select(spends).where(wanted, spends.c.void.is_(None)).order_by(spends.c.number)
    return [_spend(row) for row in connection.execute(query)]


def _spend(row: Row[Any]) -> SpendRow:
    values = row._asdict() | {"parameters": read_json(row.parameters, f"spend {row.event}")}
    del values["number"]
    return SpendRow(**values)
