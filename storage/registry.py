"""The registered clients, and the budgets of the populations whose data they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, delete, func, insert, select, update

from storage.canonical import canonical_json, read_json
from storage.database import (
    has_member,
    in_byte_order,
    insert_missing,
    lock,
    writing,
)
from storage.declared import declared
from storage.records import POLICIES, ClientRecord, Policy
from storage.refs import did_you_mean
from storage.schema import clients, populations

_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_AT_ONCE = 500  # parameters of a statement; SQLite may allow no more than 999
REGISTERING = "weft clients"
"""Name of the lock under which clients are added."""


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


class Registry:
    """Clients and populations; part of :class:`storage.ledger.Ledger`.

    Args:
        engine: from :func:`storage.database.open_database`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_client(self, record: ClientRecord) -> None:
        """Register a client, and its population with the budget if that is new.

        Raises:
            ClientExists: if the name is taken.
            BadClient: if the name, a label or the declared size is not one.
            BadBudget: if the budget is out of range, or not the one that the population has.
        """
        self.add_clients([record])

    def add_clients(self, records: Sequence[ClientRecord], places: Sequence[str] = ()) -> None:
        """Register clients in one transaction: all of them, or where one is refused, none.

        Args:
            records: the clients.
            places: where each was read, such as ``nodes.csv line 7``, for the error message.

        Raises:
            ClientExists, BadClient, BadBudget: as :meth:`add_client`, for the first that is
                refused; two of one name are refused as well.
        """
        named = list(zip(places or [""] * len(records), records, strict=True))
        with writing(self._engine) as connection:
            lock(connection, REGISTERING)
            for place, record in named:
                check_client(record, place)
            refuse_taken(connection, named)
            _add_populations(connection, named)
            if records:
                connection.execute(insert(clients), [client_row(record) for record in records])

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

    def clients(
        self,
        selector: Mapping[str, str] | None = None,
        limit: int | None = None,
        after: str = "",
    ) -> list[ClientRecord]:
        """Return the clients that have all labels of ``selector``, sorted by name; None is all.

        Args:
            selector: labels.
            limit: how many at most; None for no limit.
            after: only those whose names come after this one, for the next page.
        """
        with self._engine.connect() as connection:
            name = in_byte_order(connection, clients.c.name)
            page = _clients().order_by(name).limit(limit)
            if after:
                page = page.where(name > after)
            for key, value in (selector or {}).items():
                page = page.where(has_member(connection, clients.c.labels, key, value))
            return [_client(row) for row in connection.execute(page)]

    def client_names(self) -> set[str]:
        """Return the names of all registered clients."""
        with self._engine.connect() as connection:
            return set(connection.scalars(select(clients.c.name)))

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

    def policies(self) -> dict[str, Policy]:
        """Return what happens to a run that a population's budget has too little left for."""
        query = select(populations.c.name, populations.c.policy)
        with self._engine.connect() as connection:
            return {row.name: row.policy for row in connection.execute(query)}

    def populations(self) -> list[str]:
        """Return the populations of all clients that were ever registered, sorted."""
        with self._engine.connect() as connection:
            return sorted(connection.scalars(select(populations.c.name)))

    def set_budget(
        self,
        population: str,
        epsilon: float | None,
        delta: float | None,
        policy: Policy | None = None,
    ) -> None:
        """Change what a population may spend in all; None is no budget.

        Args:
            population: whose.
            epsilon: > 0, or None.
            delta: in (0, 1), and below one over the number of examples of each of its clients;
                None exactly where ``epsilon`` is.
            policy: what happens to a run that it has too little left for; None leaves it.

        Raises:
            BadBudget: if ``epsilon`` or ``delta`` is out of range, or above what the site declared
                that has the data; only one is given, or there is no such policy.
            UnknownPopulation: if no client ever had it.
        """
        _check_budget(epsilon, delta)
        if policy is not None and policy not in POLICIES:
            raise BadBudget(f"a budget's policy is {', '.join(POLICIES)}, got {policy!r}")
        with writing(self._engine) as connection:
            lock(connection, population_lock(population))
            size = connection.scalar(
                select(func.max(clients.c.num_examples)).where(clients.c.population == population)
            )
            _check_delta(delta, size, f"population {population!r}")
            _refuse_above(connection, population, epsilon, delta)
            values = {"epsilon": epsilon, "delta": delta, **({"policy": policy} if policy else {})}
            changed = connection.execute(
                update(populations).where(populations.c.name == population).values(values)
            )
            if changed.rowcount == 0:
                known = connection.scalars(select(populations.c.name)).all()
                raise UnknownPopulation(
                    f"no population is called {population!r}{did_you_mean(population, known)}; "
                    "register a client with it first"
                )


def population_lock(population: str) -> str:
    """Return the name of the lock that a population's spends and budget change under."""
    return f"weft population {population}"


def _clients() -> Select[Any]:
    return select(clients, populations.c.epsilon, populations.c.delta).join(populations)


def _client(row: Row[Any]) -> ClientRecord:
    read = {n: read_json(getattr(row, n), f"client {row.name}") for n in ("fields", "labels")}
    return ClientRecord(**row._asdict() | read)


def client_row(record: ClientRecord) -> dict[str, Any]:
    """Return a client as its row."""
    return {
        "name": record.name,
        "population": record.population,
        "data": record.data,
        "fields": canonical_json(record.fields, "fields"),
        "num_examples": record.num_examples,
        "labels": canonical_json(record.labels, "labels"),
        "public": record.public,
        "created_at": record.created_at,
        "node": record.node,
        "holdout": record.holdout,
    }


def check_client(record: ClientRecord, place: str = "") -> None:
    """Refuse a client that cannot be registered as it is described, read at ``place``.

    Raises:
        BadClient, BadBudget: saying what is wrong.
    """
    where = _where(place)
    if not _CLIENT_NAME.fullmatch(record.name):
        raise BadClient(
            f"{where}client name {record.name!r} must be 1 to 128 letters, digits, '.', '_' and "
            "'-', and begin with a letter or digit"
        )
    if record.num_examples is not None and record.num_examples < 0:
        raise BadClient(
            f"{where}num_examples of {record.name!r} must be >= 0, got {record.num_examples}; "
            "leave it out where it is not known"
        )
    plain = (record.population, record.data, record.holdout or "")
    texts = (*plain, *record.labels.items(), *record.fields.items())
    if any("\0" in part for text in texts for part in text):  # PostgreSQL stores none
        raise BadClient(f"{where}{record.name!r} has a text with the character NUL; leave it out")
    try:
        _check_budget(record.epsilon, record.delta)
        _check_delta(record.delta, record.num_examples, repr(record.name))
    except BadBudget as error:
        raise BadBudget(f"{where}{error}") from None


def refuse_taken(connection: Connection, named: Sequence[tuple[str, ClientRecord]]) -> None:
    """Refuse clients, each with where it was read, whose name is taken, or given twice.

    Raises:
        ClientExists: for the first.
    """
    taken: set[str] = set()
    for names in _portions([record.name for _, record in named]):
        taken |= set(connection.scalars(select(clients.c.name).where(clients.c.name.in_(names))))
    seen: dict[str, str] = {}
    for place, record in named:
        if record.name in taken:
            raise ClientExists(
                f"{_where(place)}a client called {record.name!r} is registered already; "
                "choose another name or remove that one first"
            )
        if record.name in seen:
            other = f", the other is {seen[record.name]}" if place else ""
            raise ClientExists(
                f"{_where(place)}two clients are called {record.name!r}{other}; "
                "choose another name for one of them"
            )
        seen[record.name] = place


def _add_populations(connection: Connection, named: Sequence[tuple[str, ClientRecord]]) -> None:
    """Add the populations that are new, with the budget that their first client names."""
    first: dict[str, ClientRecord] = {}
    for _, record in named:
        first.setdefault(record.population, record)
    insert_missing(
        connection,
        populations,
        [
            {"name": n, "epsilon": r.epsilon, "delta": r.delta, "created_at": r.created_at}
            for n, r in first.items()
        ],
    )
    kept: dict[str, tuple[float | None, float | None]] = {}
    for names in _portions(list(first)):
        query = select(populations).where(populations.c.name.in_(names))
        kept |= {row.name: (row.epsilon, row.delta) for row in connection.execute(query)}
    for place, record in named:
        has, given = kept[record.population], (record.epsilon, record.delta)
        if has != given:
            raise BadBudget(
                f"{_where(place)}population {record.population!r} has {_budget(*has)}, "
                f"got {_budget(*given)} for client {record.name!r}; "
                "give the same, or change it with weft clients budget"
            )


def _portions(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _AT_ONCE):
        yield names[start : start + _AT_ONCE]


def _where(place: str) -> str:
    return f"{place}: " if place else ""


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


def _check_delta(delta: float | None, size: int | None, whose: str) -> None:
    """Refuse a δ with which a mechanism may show somebody's record whole and keep its promise."""
    if delta is not None and size and delta >= 1 / size:
        raise BadBudget(
            f"delta must be below 1/{size}, one over the number of examples of {whose}, got "
            f"{delta:g}; choose a smaller delta"
        )


def _refuse_above(
    connection: Connection, population: str, epsilon: float | None, delta: float | None
) -> None:
    """Refuse to let a site's population spend more than its site does."""
    site = declared(connection, population)
    if site is None:
        return
    if epsilon is None or delta is None or epsilon > site.epsilon or delta > site.delta:
        raise BadBudget(
            f"the site of node {site.node!r} lets population {population!r} spend at most ε = "
            f"{site.epsilon:g} (δ = {site.delta:g}), and from here that can only be lowered, got "
            f"{_budget(epsilon, delta)}; only the site can raise it: in its node.yaml, with a new "
            "join file (weft node join)"
        )


def _budget(epsilon: float | None, delta: float | None) -> str:
    return "no budget" if epsilon is None else f"the budget ε = {epsilon:g} (δ = {delta:g})"
