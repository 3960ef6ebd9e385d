"""The ledger: registered clients, privacy spends, runs and their events.

Everything is durable when the call that writes it returns. Nothing in it is secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Row,
    Select,
    delete,
    insert,
    select,
    update,
)

from storage.canonical import canonical_json
from storage.database import insert_missing, lock, writing
from storage.queue import RunQueue
from storage.records import ClientRecord, Event, Queueing, RunRecord, SpendRow, Status, Wish
from storage.refs import did_you_mean
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
from storage.schema import clients, populations, spends

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

_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ClientExists(ValueError):
    """A client of this name is registered already."""


class UnknownClient(LookupError):
    """No client is called this."""


class BadClient(ValueError):
    """A client that cannot be registered as it is described."""


class BadBudget(ValueError):
    """A privacy budget out of range, or other than the one its population has."""


class UnknownPopulation(LookupError):
    """No registered client ever had this population."""


class SpendConflict(ValueError):
    """Two different spends with one event key."""


class UnknownSpend(LookupError):
    """No spend has this event key."""


class Ledger(RunLog):
    """Clients, their populations' budgets and spends, and the runs with their events.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the adapter store.

    Attributes:
        queue: claims of the runs that wait.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.queue = RunQueue(engine)

    def add_client(self, record: ClientRecord) -> None:
        """Register a client, and its population with the budget if that is new.

        Raises:
            ClientExists: if the name is taken.
            BadClient: if the name or the declared size is not one.
            BadBudget: if the budget is out of range, or not the one that the population has.
        """
        _check_client(record)
        _check_budget(record.epsilon, record.delta)
        row = {
            "name": record.name,
            "population": record.population,
            "data": record.data,
            "fields": canonical_json(record.fields, "fields"),
            "num_examples": record.num_examples,
            "labels": canonical_json(record.labels, "labels"),
            "public": record.public,
            "created_at": record.created_at,
        }
        population = {
            "name": record.population,
            "epsilon": record.epsilon,
            "delta": record.delta,
            "created_at": record.created_at,
        }
        with writing(self._engine) as connection:
            lock(connection, f"weft client {record.name}")
            taken = select(clients.c.name).where(clients.c.name == record.name)
            if connection.execute(taken).first() is not None:
                raise ClientExists(
                    f"a client called {record.name!r} is registered already; "
                    "choose another name or remove that one first"
                )
            insert_missing(connection, populations, [population])
            kept = connection.execute(
                select(populations).where(populations.c.name == record.population)
            ).one()
            if (kept.epsilon, kept.delta) != (record.epsilon, record.delta):
                raise BadBudget(
                    f"population {record.population!r} has {_budget(kept.epsilon, kept.delta)}, "
                    f"got {_budget(record.epsilon, record.delta)} for client {record.name!r}; "
                    "give the same, or change it with weft clients budget"
                )
            connection.execute(insert(clients).values(row))

    def client(self, name: str) -> ClientRecord:
        """Return a registered client.

        Raises:
            UnknownClient: if there is none, with what was perhaps meant.
        """
        with self._engine.connect() as connection:
            row = connection.execute(_clients().where(clients.c.name == name)).first()
            if row is None:
                raise UnknownClient(_unknown_client(connection, name))
        return _client(row)

    def clients(self, selector: Mapping[str, str] | None = None) -> list[ClientRecord]:
        """Return the clients that have all labels of ``selector``, sorted by name; None is all."""
        with self._engine.connect() as connection:
            found = [_client(row) for row in connection.execute(_clients())]
        wanted = dict(selector or {}).items()
        chosen = [record for record in found if wanted <= dict(record.labels).items()]
        return sorted(chosen, key=lambda record: record.name)

    def remove_client(self, name: str) -> None:
        """Forget a client; what its population has spent, and its budget, stay for ever.

        Raises:
            UnknownClient: if there is none.
        """
        with writing(self._engine) as connection:
            if connection.execute(delete(clients).where(clients.c.name == name)).rowcount == 0:
                raise UnknownClient(_unknown_client(connection, name))

    def budget(self, population: str) -> tuple[float, float] | None:
        """Return what a population may spend in all, (epsilon, delta), or None for no budget."""
        query = select(populations.c.epsilon, populations.c.delta).where(
            populations.c.name == population
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None or row.epsilon is None else (row.epsilon, row.delta)

    def budgets(self) -> dict[str, tuple[float, float]]:
        """Return what every population that has a budget may spend in all, (epsilon, delta)."""
        query = select(populations).where(populations.c.epsilon.is_not(None))
        with self._engine.connect() as connection:
            return {row.name: (row.epsilon, row.delta) for row in connection.execute(query)}

    def set_budget(self, population: str, epsilon: float | None, delta: float | None) -> None:
        """Change what a population may spend in all; None is no budget.

        Raises:
            BadBudget: if ``epsilon`` is not > 0, ``delta`` not in (0, 1), or only one is given.
            UnknownPopulation: if no client ever had it.
        """
        _check_budget(epsilon, delta)
        with writing(self._engine) as connection:
            lock(connection, _population_lock(population))
            changed = connection.execute(
                update(populations)
                .where(populations.c.name == population)
                .values(epsilon=epsilon, delta=delta)
            )
            if changed.rowcount == 0:
                known = connection.scalars(select(populations.c.name)).all()
                raise UnknownPopulation(
                    f"no population is called {population!r}{did_you_mean(population, known)}; "
                    "register a client with it first"
                )

    def record_spend(self, spend: SpendRow) -> bool:
        """Record one spend, whatever was spent before; False if it is recorded already.

        Raises:
            SpendConflict: as :meth:`record_spends_within`.
        """
        return bool(self.record_spends_within([spend], lambda population, existing, new: None))

    def record_spends_within(self, rows: Sequence[SpendRow], check: Check) -> list[SpendRow]:
        """Record all of ``rows`` or, where ``check`` refuses, none; return those that were new.

        Checking and recording are one serialised step for each population: two runs that race
        cannot together spend what neither could alone. An event that is recorded already is not
        new, so a retry spends once. A void one that comes again counts again from now on.

        Args:
            rows: what is about to be spent.
            check: called as ``check(population, existing, new)`` once for every population with
                new rows, in order of their names, ``existing`` in the order of recording. It
                raises to refuse, should be quick, and must not use the ledger.

        Raises:
            SpendConflict: if a recorded event was a different spend.
        """
        with writing(self._engine) as connection:
            for population in sorted({row.population for row in rows}):
                lock(connection, _population_lock(population))
            new = _not_recorded(connection, rows)
            for population in sorted({row.population for row in new}):
                existing = _counting(connection, spends.c.population, population)
                check(population, existing, [row for row in new if row.population == population])
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
        """Return what counts against a population's budget, in the order of recording."""
        with self._engine.connect() as connection:
            return _counting(connection, spends.c.population, population)

    def spends_of_run(self, run: str) -> list[SpendRow]:
        """Return what a run (by its id) has spent, in the order of recording."""
        with self._engine.connect() as connection:
            return _counting(connection, spends.c.run, run)


def _clients() -> Select[Any]:
    return select(clients, populations.c.epsilon, populations.c.delta).join(populations)


def _client(row: Row[Any]) -> ClientRecord:
    fields, labels = json.loads(row.fields), json.loads(row.labels)
    return ClientRecord(**row._asdict() | {"fields": fields, "labels": labels})


def _check_client(record: ClientRecord) -> None:
    if not _CLIENT_NAME.fullmatch(record.name):
        raise BadClient(
            f"client name {record.name!r} must be 1 to 128 letters, digits, '.', '_' and '-', and "
            "begin with a letter or digit"
        )
    if record.num_examples is not None and record.num_examples < 0:
        raise BadClient(
            f"num_examples of {record.name!r} must be >= 0, got {record.num_examples}; "
            "leave it out where it is not known"
        )


def _unknown_client(connection: Connection, name: str) -> str:
    known = connection.scalars(select(clients.c.name)).all()
    return f"no client is called {name!r}{did_you_mean(name, known)}"


def _check_budget(epsilon: float | None, delta: float | None) -> None:
    if epsilon is None and delta is None:
        return
    if epsilon is None or delta is None:
        raise BadBudget(f"a budget is epsilon and delta, got {epsilon} and {delta}; give both")
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise BadBudget(
            f"a budget has epsilon > 0 and delta in (0, 1), got {epsilon} and {delta}; "
            "for no budget leave both out"
        )


def _budget(epsilon: float | None, delta: float | None) -> str:
    return "no budget" if epsilon is None else f"the budget ε = {epsilon:g} (δ = {delta:g})"


def _population_lock(population: str) -> str:
    return f"weft population {population}"


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


def _counting(connection: Connection, column: Column[str], value: str) -> list[SpendRow]:
    query = select(spends).where(column == value, spends.c.void.is_(None)).order_by(spends.c.number)
    return [_spend(row) for row in connection.execute(query)]


def _spend(row: Row[Any]) -> SpendRow:
    values = row._asdict() | {"parameters": json.loads(row.parameters)}
    del values["number"]
    return SpendRow(**values)
