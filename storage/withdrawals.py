"""Clients that withdrew: they are asked no more, and cannot be registered again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, func, select

from storage.database import insert_missing, writing
from storage.records import now
from storage.schema import withdrawals


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """That a client withdrew.

    Attributes:
        client: its name.
        who: who recorded it.
        why: the reason that was given, or "".
        created_at: when, UTC.
    """

    client: str
    who: str
    why: str
    created_at: datetime


class Withdrawals:
    """Who withdrew, for good.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the ledger.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names: frozenset[str] = frozenset()

    def add(self, client: str, who: str, why: str) -> Withdrawal:
        """Record that a client withdrew, and return what is on record: the first time counts."""
        row = {"client": client, "who": who, "why": why, "created_at": now()}
        with writing(self._engine) as connection:
            insert_missing(connection, withdrawals, [row])
        return self.all()[client]

    def all(self) -> dict[str, Withdrawal]:
        """Return who withdrew, by name."""
        query = select(withdrawals).order_by(withdrawals.c.client)
        with self._engine.connect() as connection:
            return {row.client: Withdrawal(*row) for row in connection.execute(query)}

    def names(self) -> frozenset[str]:
        """Return who withdrew: their names alone, read only where somebody did since last time.

        For who asks again and again: nobody ever withdraws from having withdrawn, so that as many
        names are the same names.
        """
        with self._engine.connect() as connection:
            count = connection.scalar(select(func.count()).select_from(withdrawals))
            if count != len(self._names):
                self._names = frozenset(connection.scalars(select(withdrawals.c.client)))
        return self._names
