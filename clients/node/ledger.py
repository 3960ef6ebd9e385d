"""A site's own ledger: what was spent, ran and was sent. The authority on its data's privacy.

One SQLite file, of which a row is on the disk before what it is about leaves the site: a crash
overstates what was spent and never understates it. Budgets are node.yaml's, whatever a coordinator
believes. Reading it needs no other library, so that the owner sees it at once.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from clients.accounting import Accountant, BudgetSpent, IncomposableSpends, epsilon
from clients.charges import Charge
from strategies.spends import PrivacySpend, of_a_share

FILE = "ledger.db"
"""Its file in the site's state folder."""

_KEYED = ("*/*/key", "*/*/sums-*")  # what there is of runs with privacy, and of evaluations
_MOST_TOLD = 1_000  # rows in one reply
_OF_SHARES = (
    ", or count the noise of a sum whole (trust_coordinator_noise in node.yaml): of noise made in "
    "shares, this one's alone hides its update from the coordinator"
)
_ROUNDING = 1e-9  # as the coordinator allows: of noise that was calibrated to the limit
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spends (
    number INTEGER PRIMARY KEY, event TEXT NOT NULL UNIQUE, population TEXT NOT NULL,
    client TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, assignment TEXT NOT NULL,
    mechanism TEXT NOT NULL, unit TEXT NOT NULL, adjacency TEXT NOT NULL,
    parameters TEXT NOT NULL, shares INTEGER NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS spends_by_population ON spends (population, run);
CREATE TABLE IF NOT EXISTS runs (
    run TEXT NOT NULL, client TEXT NOT NULL, population TEXT NOT NULL, name TEXT NOT NULL,
    strategy TEXT NOT NULL, protection TEXT NOT NULL, began REAL NOT NULL,
    PRIMARY KEY (run, client));
CREATE TABLE IF NOT EXISTS bounds (
    run TEXT NOT NULL, population TEXT NOT NULL, epsilon REAL, delta REAL NOT NULL,
    PRIMARY KEY (run, population));
CREATE TABLE IF NOT EXISTS told (
    run TEXT NOT NULL, population TEXT NOT NULL, round INTEGER NOT NULL,
    upto INTEGER NOT NULL, heard INTEGER NOT NULL, PRIMARY KEY (run, population));
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY, run TEXT NOT NULL, client TEXT NOT NULL, round INTEGER NOT NULL,
    action TEXT NOT NULL, began REAL NOT NULL, ended REAL, outcome TEXT, reason TEXT,
    bytes INTEGER, sha256 TEXT);
"""

Protection: TypeAlias = Literal["examples", "client", "none", "public"]
"""What hides a client's data in a run: noise over examples, over whole clients, or nothing."""

_HIDES: Mapping[Protection, str] = {
    "examples": "hid examples (DP-SGD)",
    "client": "hid whole clients (client-level privacy)",
    "none": "had no privacy",
    "public": "took the data as public",
}
ALL = ""
"""The run of a bound on all runs together."""

_SCORED = """SELECT run, client FROM answers a WHERE action = 'evaluate' AND NOT EXISTS
    (SELECT 1 FROM runs r WHERE r.run = a.run AND r.client = a.client)
GROUP BY run, client HAVING max(began) < ?"""
_COLUMNS = (
    "event, population, client, run, round, assignment, mechanism, unit, adjacency, parameters"
)


class LedgerUnavailable(RuntimeError):
    """The site's ledger cannot be read or written; nothing may be released."""


class MixedProtection(ValueError):
    """A run asks a client for another kind of privacy than before."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent of one population.

    Attributes:
        delta: at which epsilon is meant.
        epsilon: by all runs together, or None for any.
        per_run: by one run, or None for any.
        sums: whether the noise of a sum counts whole that clients make in shares. Else each share
            counts as what it is: all that hides an update from whoever sees it by itself.
    """

    delta: float
    epsilon: float | None = None
    per_run: float | None = None
    sums: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A run at one client.

    Attributes:
        run: the run's id.
        client: the client's name.
        population: whose data it trains on.
        name: of the run.
        strategy: of the run.
        protection: that all of its rounds have here.
    """

    run: str
    client: str
    population: str
    name: str
    strategy: str
    protection: Protection


class Ledger:
    """The ledger of the site whose private state is in ``folder``.

    Args:
        folder: created with mode 0700 where it does not exist.

    Raises:
        LedgerUnavailable: if the site has trained with privacy, and the ledger of it is gone.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / FILE
        if not self._path.exists() and any(any(folder.glob(one)) for one in _KEYED):
            raise LedgerUnavailable(
                f"{self._path} is gone, and what runs with privacy keep is there: what they spent "
                "is not known any more. Restore it from a backup"
            )
        with self._connected() as connection:
            self._path.chmod(0o600)
            connection.executescript(_SCHEMA)

    def enter(self, entry: Entry) -> None:
        """Note that a run begins at a client, and under which protection all of it stays.

        What a client keeps from round to round is as protected as the round that made it. A round
        of another kind could release it.

        Raises:
            MixedProtection: if an earlier round of the run had another.
            LedgerUnavailable: if it cannot be written.
        """
        with self._written() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*asdict(entry).values(), time.time()),
            )
            [[before]] = connection.execute(
                "SELECT protection FROM runs WHERE run = ? AND client = ?",
                (entry.run, entry.client),
            )
        if before != entry.protection:
            raise MixedProtection(
                f"an earlier round of this run {_HIDES[before]} at {entry.client}, and what the "
                f"client kept of it is no better hidden; one that {_HIDES[entry.protection]} "
                "must be another run"
            )

    def entered(self, run: str, client: str) -> bool:
        """Return whether a run has begun at a client, not just an evaluation.

        Raises:
            LedgerUnavailable: if it cannot be read.
        """
        return bool(self.rows("SELECT 1 FROM runs WHERE run = ? AND client = ?", run, client))

    def scored_before(self, moment: float) -> list[tuple[str, str]]:
        """Return run and client of evaluations outside of runs that nobody asked for since.

        Args:
            moment: Unix time, seconds.

        Raises:
            LedgerUnavailable: if it cannot be read.
        """
        return [(row["run"], row["client"]) for row in self.rows(_SCORED, moment)]

    def charge(self, charged: Charge, budget: Budget, shares: int = 0) -> None:
        """Put a spend on the ledger, if budgets allow; the same event again costs nothing.

        Durable when it returns.

        Args:
            charged: what an assignment costs.
            budget: of its population.
            shares: by how many clients' shares the noise is made; 0 where this one makes it.

        Raises:
            BudgetSpent: if it is more than the budgets allow; then nothing is written.
            LedgerUnavailable: if it cannot be written.
        """
        with self._written() as connection:
            query = "SELECT 1 FROM spends WHERE event = ?"
            if connection.execute(query, (charged.event,)).fetchone():
                return
            before = _counted(connection, charged.population, budget.sums)
            alone = 0 if budget.sums else shares
            new = _alone(charged.spend, alone)
            own = [spend for run, spend in before if run == charged.run]
            every = [spend for _, spend in before]
            try:
                run = ("this run", charged.population)
                of_run = _bound(own, new, budget.per_run, budget.delta, run)
                every_run = ("all runs together", charged.population)
                of_all = _bound(every, new, budget.epsilon, budget.delta, every_run)
            except BudgetSpent as error:
                raise BudgetSpent(f"{error}{_OF_SHARES if alone else ''}") from None
            row = {**asdict(charged), "parameters": json.dumps(dict(charged.parameters))}
            connection.execute(
                f"INSERT INTO spends ({', '.join(row)}, shares, at) "
                f"VALUES ({', '.join('?' * len(row))}, ?, ?)",
                (*row.values(), shares, time.time()),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO bounds VALUES (?, ?, ?, ?)",
                [
                    (charged.run, charged.population, of_run, budget.delta),
                    (ALL, charged.population, of_all, budget.delta),
                ],
            )

    def has(self, event: str) -> bool:
        """Return whether a spend is on the ledger.

        Raises:
            LedgerUnavailable: if it cannot be read.
        """
        return bool(self.rows("SELECT 1 FROM spends WHERE event = ?", event))

    def charges(self, population: str) -> list[Charge]:
        """Return what was ever spent of a population, oldest first.

        Raises:
            LedgerUnavailable: if it cannot be read.
        """
        with self._connected() as connection:
            return _rows(connection, population)

    def spent(self, population: str) -> list[PrivacySpend]:
        """Return what was ever spent of a population, as what composes."""
        return [row.spend for row in self.charges(population)]

    def unknown_to(self, run: str, population: str, round_: int) -> list[dict[str, Any]]:
        """Return spends of other runs that a run's coordinator may lack, as JSON.

        What a reply told is not told again once the coordinator asks for a later round; one that
        it lacks for ever is refused by this ledger all the same.

        Raises:
            LedgerUnavailable: if it cannot be written.
        """
        with self._written() as connection:
            key = (run, population)
            query = "SELECT round, upto, heard FROM told WHERE run = ? AND population = ?"
            told = connection.execute(query, key).fetchone() or (round_, 0, 0)
            heard = told[1] if round_ > told[0] else told[2]
            rows = connection.execute(
                f"SELECT number, {_COLUMNS} FROM spends WHERE population = ? AND run != ? "
                "AND number > ? ORDER BY number LIMIT ?",
                (population, run, heard, _MOST_TOLD),
            ).fetchall()
            upto = rows[-1][0] if rows else heard
            connection.execute(
                "INSERT OR REPLACE INTO told VALUES (?, ?, ?, ?, ?)", (*key, round_, upto, heard)
            )
        return [asdict(_charge(row[1:])) for row in rows]

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Return what a query finds, by column.

        Raises:
            LedgerUnavailable: if it cannot be read.
        """
        with self._connected() as connection:
            found = connection.execute(query, values)
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found]

    def begin(self, run: str, client: str, round_: int, action: str) -> int:
        """Note that an order is worked at; return its number."""
        with self._written() as connection:
            row = connection.execute(
                "INSERT INTO answers (run, client, round, action, began) VALUES (?, ?, ?, ?, ?)",
                (run, client, round_, action, time.time()),
            )
            return int(row.lastrowid or 0)

    def end(self, number: int, outcome: str, reason: str, size: int, sha256: str) -> None:
        """Note what an order was answered with, before it is sent.

        Args:
            number: as :meth:`begin` returned it.
            outcome: ``update``, ``evaluation`` or ``refusal``.
            reason: of a refusal, as it is told.
            size: of what is sent, bytes.
            sha256: of what is sent.
        """
        with self._written() as connection:
            connection.execute(
                "UPDATE answers SET ended = ?, outcome = ?, reason = ?, bytes = ?, sha256 = ? "
                "WHERE number = ?",
                (time.time(), outcome, reason, size, sha256, number),
            )

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=60, isolation_level=None)) as opened:
                opened.execute("PRAGMA journal_mode = WAL")
                opened.execute("PRAGMA synchronous = FULL")
                yield opened
        except sqlite3.Error as error:
            raise LedgerUnavailable(
                f"the site's ledger cannot be used ({error}), and nothing is released without it"
            ) from error

    @contextmanager
    def _written(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def _rows(connection: sqlite3.Connection, population: str) -> list[Charge]:
    query = f"SELECT {_COLUMNS} FROM spends WHERE population = ? ORDER BY number"
    return [_charge(row) for row in connection.execute(query, (population,))]


def _charge(row: Sequence[Any]) -> Charge:
    facts = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Charge(**{**facts, "parameters": json.loads(facts["parameters"])})


def _counted(
    connection: sqlite3.Connection, population: str, sums: bool
) -> list[tuple[str, PrivacySpend]]:
    """Return what a population's spends count against budgets, each with its run."""
    query = f"SELECT shares, {_COLUMNS} FROM spends WHERE population = ? ORDER BY number"
    rows = connection.execute(query, (population,)).fetchall()
    charges = [(_charge(row[1:]), 0 if sums else row[0]) for row in rows]
    return [(charge.run, _alone(charge.spend, shares)) for charge, shares in charges]


def _alone(spend: PrivacySpend, shares: int) -> PrivacySpend:
    return of_a_share(spend, shares) if shares else spend


def _bound(
    before: Sequence[PrivacySpend],
    new: PrivacySpend,
    limit: float | None,
    delta: float,
    whose: tuple[str, str],
) -> float | None:
    """Return a bound on the epsilon of what was spent and a new spend; None where there is none.

    By the accountant that takes no time where that shows that it is within the limit, and else by
    the tight one: which of them decides changes nothing.

    Raises:
        BudgetSpent: if it is over the limit.
    """
    runs, population = whose
    spends = [*before, new]
    by: Accountant = "rdp"
    try:
        total = epsilon(spends, delta, by)
        if limit is not None and total > limit:
            by = "prv"
            total = epsilon(spends, delta, by)
        if limit is None or total <= limit + _ROUNDING:
            return total
        spent = epsilon(before, delta, by)
    except IncomposableSpends as error:
        if limit is None:
            return None
        raise BudgetSpent(f"population {population}: {error}") from None
    raise BudgetSpent(
        f"the site lets {runs} spend ε = {limit:g} (δ = {delta:g}) of population "
        f"{population}; {spent:.2f} is spent, and this round would bring it to {total:.2f}. "
        "Only the site's owner can allow more"
    )
