"""The queue: who drives which run, by leases with fencing tokens.

The queue is the table of runs. A claim gives its owner a lease and a token that is one more than
the last; the lease decides who may claim, the token who may write. A clock that jumps can end a
lease too early or too late: then a run changes hands while its first driver lives, whose next event
is refused, or it waits longer than it must. Two drivers never both write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, func, or_, select, update

from storage.canonical import read_json
from storage.database import lock, writing
from storage.records import RunRecord, Wish
from storage.runs import append, clock, lost, standing, take
from storage.schema import runs

_ENDED = ("completed", "cancelled")


class RunQueue:
    """Claims runs for drivers; part of :class:`storage.ledger.Ledger`.

    Args:
        engine: from :func:`storage.database.open_database`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def claim(
        self,
        owner: str,
        lease_s: float,
        limits: Mapping[str, int] | None = None,
        run: str | None = None,
    ) -> RunRecord | None:
        """Make ``owner`` the driver of a run and return its record; None if there is none.

        Without ``run``, it is the one of highest priority, then the oldest, of those that wait or
        whose lease is over, and whose every label is below its limit among the live leases. Of
        several processes that claim at once, one gets it.

        Args:
            owner: who claims.
            lease_s: seconds until the run is another's to claim unless the lease is renewed, > 0.
            limits: how many runs with a label, written ``key=value``, may be driven at once.
            run: only this one (its full id), also if it is paused or has failed.

        Raises:
            UnknownRun: if there is no such run.
        """
        with writing(self._engine) as connection:
            # one claim at a time: limits are about all live leases together
            lock(connection, "weft claim")
            moment = clock(connection)
            full = _full_labels(connection, moment, limits or {})
            while True:
                found = run or _best(connection, moment, full)
                # somebody may have cancelled it since it was found; then it is looked for again
                if found is None or _may_be_taken(standing(connection, found), moment, full, run):
                    break
                if run is not None:
                    return None
            # read before anybody else can claim it: the token must be the one that was given
            return None if found is None else take(connection, found, owner, lease_s)

    def renew(self, run: str, token: int, lease_s: float) -> None:
        """Make the lease on a run (by its id) last ``lease_s`` seconds from now.

        Raises:
            LeaseLost: if the run has another token by now, or nobody drives it.
            UnknownRun: if there is no such run.
        """
        with writing(self._engine) as connection:
            row = _held(standing(connection, run), token)
            until = clock(connection) + timedelta(seconds=lease_s)
            connection.execute(update(runs).where(runs.c.id == row.id).values(lease_until=until))

    def release(self, run: str, token: int, reason: str) -> None:
        """Put a run (by its id) back into the queue, in its old place.

        Raises:
            LeaseLost: if the run has another token by now, or nobody drives it.
            UnknownRun: if there is no such run.
        """
        with writing(self._engine) as connection:
            row = _held(standing(connection, run), token)
            data = {"owner": row.owner, "reason": reason}
            append(connection, run, "released", data, {"status": "queued", "token": token + 1})

    def wanted(self, run: str, token: int) -> Wish:
        """Return what people want of a run (by its id) that is being driven.

        Raises:
            LeaseLost: if the run has another token by now, or nobody drives it.
            UnknownRun: if there is no such run.
        """
        with self._engine.connect() as connection:
            wish: Wish = _held(standing(connection, run, locked=False), token).wanted
        return wish

    def is_driven(self, run: str) -> bool:
        """Return whether somebody holds a live lease on a run (by its id)."""
        with self._engine.connect() as connection:
            live = _live(clock(connection))
            return (
                connection.execute(select(runs.c.id).where(runs.c.id == run, live)).first()
                is not None
            )

    def is_idle(self) -> bool:
        """Return whether no run waits and none is being driven."""
        query = select(runs.c.id).where(runs.c.status.in_(("queued", "running"))).limit(1)
        with self._engine.connect() as connection:
            return connection.execute(query).first() is None

    def labelled(self, key: str, value: str) -> list[str]:
        """Return the ids of the runs with a label, oldest first."""
        with self._engine.connect() as connection:
            kinds = connection.scalars(select(runs.c.labels).distinct())
            meant = [kind for kind in kinds if f"{key}={value}" in _labels(kind)]
            query = select(runs.c.id).where(runs.c.labels.in_(meant)).order_by(runs.c.number)
            return list(connection.scalars(query))

    def labels(self, key: str) -> list[str]:
        """Return the values that runs have for a label, sorted."""
        with self._engine.connect() as connection:
            kinds = connection.scalars(select(runs.c.labels).distinct())
            found = [read_json(kind, "a run's labels") for kind in kinds]
        return sorted({labels[key] for labels in found if key in labels})


def _live(moment: datetime) -> ColumnElement[bool]:
    return and_(runs.c.status == "running", runs.c.lease_until > moment)


def _orphaned(moment: datetime) -> ColumnElement[bool]:
    over = or_(runs.c.lease_until.is_(None), runs.c.lease_until <= moment)
    return and_(runs.c.status == "running", over)


def _full_labels(
    connection: Connection, moment: datetime, limits: Mapping[str, int]
) -> frozenset[str]:
    """Return the labels of which no more runs may be driven."""
    if not limits:
        return frozenset()
    live = connection.scalars(select(runs.c.labels).where(_live(moment)))
    used = Counter(label for labels in live for label in _labels(labels))
    return frozenset(label for label, limit in limits.items() if used[label] >= limit)


def _labels(text: str) -> frozenset[str]:
    return frozenset(f"{key}={value}" for key, value in read_json(text, "a run's labels").items())


def _best(connection: Connection, moment: datetime, full: frozenset[str]) -> str | None:
    """Return the id of the run to claim first."""
    found = [
        row
        for waiting in (runs.c.status == "queued", _orphaned(moment))
        if (row := _first(connection, waiting, full)) is not None
    ]
    first = min(found, key=lambda row: (-row.priority, row.number), default=None)
    return None if first is None else first.id


def _first(
    connection: Connection, waiting: ColumnElement[bool], full: frozenset[str]
) -> Row[str, int, int] | None:
    """Return the first of the runs that wait in this way; each step is a look into an index."""
    if full:
        kinds = connection.scalars(select(runs.c.labels).where(waiting).distinct())
        waiting = and_(waiting, runs.c.labels.not_in([k for k in kinds if _labels(k) & full]))
    highest = select(func.max(runs.c.priority)).where(waiting).scalar_subquery()
    query = (
        select(runs.c.id, runs.c.priority, runs.c.number)
        .where(waiting, runs.c.priority == highest)
        .order_by(runs.c.number)
        .limit(1)
    )
    return connection.execute(query).first()


def _may_be_taken(row: Row[Any], moment: datetime, full: frozenset[str], asked: str | None) -> bool:
    """Return whether a run, whose row is locked, is anyone's to drive."""
    if _labels(row.labels) & full:
        return False
    if row.status == "running":
        return row.lease_until is None or row.lease_until <= moment
    return row.status == "queued" or (asked is not None and row.status not in _ENDED)


def _held(row: Row[Any], token: int) -> Row[Any]:
    """Return a run's row if who has ``token`` still drives the run."""
    if row.token != token or row.status != "running":
        raise lost(row, token)
    return row
