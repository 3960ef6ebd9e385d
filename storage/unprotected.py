"""Runs without DP on data that are not public: no ε bounds what they tell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, select

from storage.database import insert_missing, writing
from storage.membership import is_among
from storage.records import now
from storage.schema import unprotected_runs


@dataclass(frozen=True, slots=True)
class Unprotected:
    """That a run trains on a population's data without DP.

    Attributes:
        population: whose data.
        run: the run's id.
        reason: why that was accepted although there was a budget; "" where there was none.
        who: who launched it.
        created_at: when it began, UTC.
    """

    population: str
    run: str
    reason: str
    who: str
    created_at: datetime


class UnprotectedRuns:
    """Which runs trained on whose data without DP, for ever.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the ledger.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, run: str, populations: Collection[str], reason: str, who: str) -> None:
        """Record that a run trains on these data without DP; what is on record stays as it is."""
        moment = now()
        facts = {"run": run, "reason": reason, "who": who, "created_at": moment}
        with writing(self._engine) as connection:
            rows = [{"population": one, **facts} for one in sorted(set(populations))]
            insert_missing(connection, unprotected_runs, rows)

    def of(self, populations: Collection[str]) -> list[Unprotected]:
        """Return the runs without DP on any of these populations' data, oldest first."""
        table = unprotected_runs
        with self._engine.connect() as connection:
            wanted = is_among(connection, table.c.population, sorted(populations))
            query = select(table).where(wanted)
            rows = connection.execute(
                query.order_by(table.c.created_at, table.c.run, table.c.population)
            )
            return [Unprotected(**row._asdict()) for row in rows]
