"""Runs and their logs: where each stands, and what happened in it, in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, TypedDict, Unpack

from sqlalchemy import Connection, Engine, Row, Select, func, insert, select, update

from storage.canonical import canonical_json, read_json
from storage.database import lock, writing
from storage.projection import PROJECTED, applied
from storage.records import (
    STATUSES,
    WISHES,
    Event,
    Queueing,
    RunRecord,
    Status,
    Wish,
    now,
)
from storage.refs import did_you_mean
from storage.schema import Timestamp, events, plans, runs

MAX_LABELS = 1000
"""Characters that a run's labels may have as JSON: they are in an index."""


class RunExists(ValueError):
    """A run of this id exists already."""


class UnknownRun(LookupError):
    """No run is called this."""


class AmbiguousRun(LookupError):
    """More than one run's id begins with this."""


class BadStatus(ValueError):
    """A run cannot have this status, or people want this of it."""


class BadLabels(ValueError):
    """A run cannot have these labels."""


class LeaseLost(RuntimeError):
    """The run changed hands: who drove it may write no more of it."""


class RunChanged(RuntimeError):
    """Something happened to the run since it was read; read it again and decide again."""


class RunFields(TypedDict, total=False):
    """What of a run an event may change; see :class:`storage.records.RunRecord`."""

    status: Status
    version: str | None
    round: int
    rounds: int
    error: str | None
    wanted: Wish


class RunLog:
    """The runs and their events; part of :class:`storage.ledger.Ledger`.

    Args:
        engine: from :func:`storage.database.open_database`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create_run(
        self,
        id: str,
        name: str,
        config: Mapping[str, Any],
        plan: Mapping[str, Any],
        rounds: int = 0,
        queueing: Queueing | None = None,
    ) -> RunRecord:
        """Record a new run, queued or with its owner already, and return its record.

        Args:
            id: unique, for ever.
            name: what people call it.
            config: the resolved config, JSON; nothing secret.
            plan: what was planned from it, JSON.
            rounds: how many there will be; 0 where that is not known yet.
            queueing: how it waits; by default with priority 0, for anyone.

        Raises:
            RunExists: if the id is taken.
            BadLabels: if the labels are too long to search by.
            NotJson: if the config or the plan is not JSON.
        """
        wait = queueing or Queueing()
        labels = canonical_json(wait.labels, "labels")
        if len(labels) > MAX_LABELS:
            raise BadLabels(
                f"a run's labels may have {MAX_LABELS} characters in all, got {len(labels)}; "
                "give fewer or shorter ones"
            )
        row = {
            "id": id,
            "name": name,
            "status": "queued",
            "config": canonical_json(config, "config"),
            "round": 0,
            "rounds": rounds,
            "created_at": now(),
        }
        planned = {"run": id, "plan": canonical_json(plan, "plan")}
        queued = {"status": "queued", "rounds": rounds, "priority": wait.priority}
        with writing(self._engine) as connection:
            lock(connection, f"weft run {id}")
            if connection.execute(_runs().where(runs.c.id == id)).first() is not None:
                raise RunExists(f"a run with the id {id!r} exists already; resume it or take a new")
            connection.execute(insert(runs).values(row))
            connection.execute(insert(plans).values(planned))
            append(connection, id, "queued", wait.facts, queued | {"labels": dict(wait.labels)})
            if wait.owner is not None:
                take(connection, id, wait.owner, wait.lease_s)
            return _run(connection.execute(_runs().where(runs.c.id == id)).one())

    def run(self, ref: str) -> RunRecord:
        """Return a run by its id, its name (the newest of it), or a prefix of its id.

        Raises:
            UnknownRun: if there is none, with what was perhaps meant.
            AmbiguousRun: if several ids begin with it and it is no name.
        """
        newest_first = _runs().order_by(runs.c.number.desc())
        with self._engine.connect() as connection:
            for found in (runs.c.id == ref, runs.c.name == ref):
                row = connection.execute(newest_first.where(found).limit(1)).first()
                if row is not None:
                    return _run(row)
            prefixed = func.substr(runs.c.id, 1, len(ref)) == ref
            rows = connection.execute(newest_first.where(prefixed).limit(6)).all() if ref else []
            if not rows:
                known = connection.scalars(select(runs.c.name).distinct()).all()
                raise UnknownRun(f"no run is called {ref!r}{did_you_mean(ref, known)}")
        if len(rows) > 1:
            listed = ", ".join(row.id for row in rows[:5]) + (" and more" if rows[5:] else "")
            raise AmbiguousRun(f"{ref!r} begins {listed}; give more of the id")
        return _run(rows[0])

    def plan(self, run: str) -> dict[str, Any]:
        """Return what was planned for a run (by its id), JSON; megabytes for 10,000 clients.

        Raises:
            UnknownRun: if there is no such run.
        """
        with self._engine.connect() as connection:
            text = connection.scalar(select(plans.c.plan).where(plans.c.run == run))
        if text is None:
            raise _no_run(run)
        return read_json(text, f"the plan of run {run}")

    def runs(
        self, limit: int = 100, before: str | None = None, status: Status | None = None
    ) -> list[RunRecord]:
        """Return runs, newest first.

        Args:
            limit: how many at most.
            before: only those older than the run with this id, for the next page.
            status: only those that stand so.

        Raises:
            UnknownRun: if there is no run ``before``.
            BadStatus: if there is no such status.
        """
        if status is not None:
            _check({"status": status})
        # the numbers first, from an index alone: rows are long
        page = select(runs.c.number).order_by(runs.c.number.desc()).limit(limit)
        with self._engine.connect() as connection:
            if before is not None:
                _require_run(connection, before)
                older = select(runs.c.number).where(runs.c.id == before).scalar_subquery()
                page = page.where(runs.c.number < older)
            if status is not None:
                page = page.where(runs.c.status == status)
            numbers = connection.scalars(page).all()
            found = _runs().where(runs.c.number.in_(numbers)).order_by(runs.c.number.desc())
            return [_run(row) for row in connection.execute(found)]

    def runs_at(self, version: str) -> list[str]:
        """Return the ids of the runs whose last version is this one, oldest first."""
        query = select(runs.c.id).where(runs.c.version == version).order_by(runs.c.number)
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def record(
        self,
        run: str,
        kind: str,
        data: Mapping[str, Any],
        *,
        token: int | None = None,
        after: int | None = None,
        **fields: Unpack[RunFields],
    ) -> int:
        """Add an event to a run (by its id) and bring its row up to date, in one transaction.

        Fields that are not given stay as they are, but for what follows from a status; see
        :func:`storage.projection.applied`. A status that somebody without the token sets takes
        the run away from whoever drives it.

        Args:
            run: its full id.
            kind: what happened.
            data: the facts of it, JSON.
            token: of who drives the run: refused if it is not the newest.
            after: number of the event that must be the run's last: refused if another followed.
            **fields: what it changes of where the run stands.

        Returns:
            The event's number: 1, 2, ... without gaps.

        Raises:
            LeaseLost: if the run has another token by now; nothing was written.
            RunChanged: if ``after`` is not its last event; nothing was written.
            BadStatus: if there is no such status or wish.
            UnknownRun: if there is no such run.
            NotJson: if ``data`` is not JSON.
        """
        _check(fields)
        with writing(self._engine) as connection:
            row = standing(connection, run)
            if token is not None and row.token != token:
                raise lost(row, token)
            if after is not None and row.seq != after:
                raise RunChanged(
                    f"run {run} has event {row.seq} by now, not {after}; look at it again"
                )
            changes: dict[str, Any] = dict(fields)
            if token is None and "status" in fields:
                changes["token"] = row.token + 1
            return append(connection, run, kind, data, changes)

    def last_event(self, run: str, kind: str) -> Event | None:
        """Return the last event of a kind of a run (by its id), or None."""
        query = (
            select(events)
            .where(events.c.run == run, events.c.kind == kind)
            .order_by(events.c.seq.desc())
            .limit(1)
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else _event(row)

    def events(
        self,
        run: str,
        after: int = 0,
        limit: int | None = None,
        kinds: Collection[str] | None = None,
    ) -> list[Event]:
        """Return the events of a run (by its id) with numbers above ``after``, in order.

        Args:
            run: its full id.
            after: the last number that is known; 0 for all.
            limit: how many at most; None for no limit.
            kinds: only those of these kinds; None for all.

        Raises:
            UnknownRun: if there is no such run.
        """
        query = (
            select(events).where(events.c.run == run, events.c.seq > after).order_by(events.c.seq)
        )
        if kinds is not None:
            query = query.where(events.c.kind.in_(kinds))
        with self._engine.connect() as connection:
            _require_run(connection, run)
            return [_event(row) for row in connection.execute(query.limit(limit))]


def standing(connection: Connection, run: str, locked: bool = True) -> Row[Any]:
    """Return where a run stands; ``locked``: nobody changes it until the transaction ends.

    Raises:
        UnknownRun: if there is no such run.
    """
    names = (runs.c.id, runs.c.seq, runs.c.lease_until, *(runs.c[name] for name in PROJECTED))
    query = select(*names).where(runs.c.id == run)
    row = connection.execute(query.with_for_update() if locked else query).first()
    if row is None:
        raise _no_run(run)
    return row


def lost(row: Row[Any], token: int) -> LeaseLost:
    """Return the error that tells who has ``token`` that it may write no more."""
    holder = f"; {row.owner} drives it now" if row.owner else f"; it is {row.status}"
    return LeaseLost(
        f"run {row.id} has the token {row.token}, and this driver's is {token}: it was claimed or "
        f"changed by somebody else meanwhile{holder}. Nothing more was written; see: "
        f"weft runs log {row.id}"
    )


def append(
    connection: Connection,
    run: str,
    kind: str,
    data: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> int:
    """Add an event and bring the run's row up to date; return the event's number.

    Raises:
        UnknownRun: if there is no such run.
        NotJson: if ``data`` or ``changes`` is not JSON.
    """
    at = now()
    row = standing(connection, run)
    event = {
        "run": run,
        "seq": row.seq + 1,
        "kind": kind,
        "data": canonical_json(data, "data"),
        "created_at": at,
        "changes": canonical_json(changes, "changes"),
    }
    before = {name: getattr(row, name) for name in PROJECTED}
    after = applied(before | {"labels": read_json(row.labels, f"run {run}")}, changes, at)
    values = after | {"labels": canonical_json(after["labels"], "labels"), "seq": row.seq + 1}
    if after["owner"] is None:
        values["lease_until"] = None
    connection.execute(update(runs).where(runs.c.id == run).values(values))
    connection.execute(insert(events).values(event))
    seq: int = event["seq"]
    return seq


def clock(connection: Connection) -> datetime:
    """Return the time that leases go by: the server's; on SQLite, this machine's."""
    if connection.dialect.name == "postgresql":
        return connection.scalars(select(func.clock_timestamp(type_=Timestamp))).one()
    return now()


def take(connection: Connection, run: str, owner: str, lease_s: float) -> RunRecord:
    """Make ``owner`` the driver of a run, with a new token and a lease; return its record.

    Raises:
        UnknownRun: if there is no such run.
    """
    token = standing(connection, run).token + 1
    changes = {"status": "running", "owner": owner, "token": token}
    append(connection, run, "claimed", {"owner": owner, "token": token}, changes)
    until = clock(connection) + timedelta(seconds=lease_s)
    connection.execute(update(runs).where(runs.c.id == run).values(lease_until=until))
    return _run(connection.execute(_runs().where(runs.c.id == run)).one())


def _runs() -> Select[Any]:
    return select(*(column for column in runs.columns if column.name != "number"))


def _run(row: Row[Any]) -> RunRecord:
    documents = {
        name: read_json(getattr(row, name), f"run {row.id}") for name in ("config", "labels")
    }
    return RunRecord(**row._asdict() | documents)


def _event(row: Row[Any]) -> Event:
    what = f"event {row.seq} of run {row.run}"
    data, changes = read_json(row.data, what), read_json(row.changes, what)
    return Event(row.seq, row.kind, data, row.created_at, changes)


def _check(fields: RunFields) -> None:
    for name, allowed in (("status", STATUSES), ("wanted", WISHES)):
        given = fields.get(name, allowed[0])
        if given not in allowed:
            raise BadStatus(f"a run's {name} is one of {', '.join(allowed)}; got {given!r}")


def _require_run(connection: Connection, run: str) -> None:
    if connection.execute(select(runs.c.id).where(runs.c.id == run)).first() is None:
        raise _no_run(run)


def _no_run(run: str) -> UnknownRun:
    return UnknownRun(f"no run has the id {run!r}; create it first, or give its full id")
