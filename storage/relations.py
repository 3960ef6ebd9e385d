"""Which populations share records: what is spent on one counts against the budgets of all of them.

Only that two populations share some is known here, and not how many or which: the records' digests
stay where the data are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import Connection, Engine, select

from storage.database import insert_missing, lock, writing
from storage.membership import is_among
from storage.records import now
from storage.schema import related

RELATING = "weft relations"
"""The lock under which a relation is added; who decides by relations holds it shared."""


class Relations:
    """Which populations share records, for ever: records that were shared once may be again.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the ledger.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, found: Mapping[str, Collection[str]]) -> bool:
        """Record that each population shares records with each of the others, both ways.

        Returns:
            Whether any of it was news.
        """
        pairs = {(one, other) for one, others in found.items() for other in others if one != other}
        if not pairs:
            return False
        with writing(self._engine) as connection:
            lock(connection, RELATING)
            known = {
                (row.population, row.other)
                for row in connection.execute(
                    select(related).where(
                        is_among(connection, related.c.population, sorted({p for p, _ in pairs}))
                    )
                )
            }
            both = sorted((pairs | {(b, a) for a, b in pairs}) - known)
            moment = now()
            insert_missing(
                connection,
                related,
                [{"population": a, "other": b, "created_at": moment} for a, b in both],
            )
            return not pairs <= known

    def of(self, population: str) -> frozenset[str]:
        """Return the populations that share records with this one, without itself."""
        with self._engine.connect() as connection:
            return relatives(connection, [population]).get(population, frozenset())

    def all(self) -> dict[str, frozenset[str]]:
        """Return the relatives of every population that has any, by its name."""
        with self._engine.connect() as connection:
            return _grouped(connection.execute(select(related.c.population, related.c.other)))


def relatives(connection: Connection, names: Collection[str]) -> dict[str, frozenset[str]]:
    """Return, of those of ``names`` that share records with others, which these are."""
    wanted = select(related.c.population, related.c.other).where(
        is_among(connection, related.c.population, sorted(names))
    )
    return _grouped(connection.execute(wanted))


def _grouped(rows: object) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for population, other in rows:  # type: ignore[attr-defined]  # a result's rows
        found.setdefault(population, set()).add(other)
    return {population: frozenset(others) for population, others in sorted(found.items())}
