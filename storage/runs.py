"""Runs and their logs: where each stands, and what happened in it, in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from sqlalchemy import Connection, Engine, Row, Select, func, insert, select, update

from storage.canonical import canonical_json
from storage.database import lock, writing
from storage.records import FINAL, STATUSES, Event, RunRecord, Status, now
from storage.refs import did_you_mean
from storage.schema import events, runs


class RunExists(ValueError):
    """A run of this id exists already."""


class UnknownRun(LookupError):
    """No run is called this."""


class AmbiguousRun(LookupError):
    """More than one run's id begins with this."""


class BadStatus(ValueError):
    """A run cannot have this status."""


class RunFields(TypedDict, total=False):
    """What of a run changes while it goes on; see :class:`storage.records.RunRecord`."""

    version: str | None
    round: int
    rounds: int
    error: str | None


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
    ) -> RunRecord:
        """Record a new run, queued, and return its record.

        Args:
            id: unique, for ever.
            name: what people call it.
            config: the resolved config, JSON; nothing secret.
            plan: what was planned from it, JSON.
            rounds: how many there will be; 0 where that is not known yet.

        Raises:
            RunExists: if the id is taken.
            NotJson: if the config or the plan is not JSON.
        """
        row = {
            "id": id,
            "name": name,
            "status": "queued",
            "config": canonical_json(config, "config"),
            "plan": canonical_json(plan, "plan"),
            "round": 0,
            "rounds": rounds,
            "created_at": now(),
        }
        with writing(self._engine) as connection:
            lock(connection, f"weft run {id}")
            if connection.execute(_runs().where(runs.c.id == id)).first() is not None:
                raise RunExists(f"a run with the id {id!r} exists already; resume it or take a new")
            connection.execute(insert(runs).values(row))
        return self.run(id)

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

    def runs(self, limit: int = 100, offset: int = 0) -> list[RunRecord]:
        """Return runs, newest first."""
        page = _runs().order_by(runs.c.number.desc()).limit(limit).offset(offset)
        with self._engine.connect() as connection:
            return [_run(row) for row in connection.execute(page)]

    def set_status(self, run: str, status: Status, **fields: Unpack[RunFields]) -> None:
        """Say where a run (by its id) stands; fields that are not given stay as they are.

        The first ``running`` sets ``started_at``; a final status sets ``finished_at``, any other
        clears it, as when a failed run is resumed. ``error`` is cleared unless given.

        Raises:
            BadStatus: if there is no such status.
            UnknownRun: if there is no such run.
        """
        if status not in STATUSES:
            raise BadStatus(f"a run is one of {', '.join(STATUSES)}; got {status!r}")
        moment = now()
        values: dict[str, Any] = {
            "error": None,
            **fields,
            "status": status,
            "finished_at": moment if status in FINAL else None,
        }
        if status == "running":
            values["started_at"] = func.coalesce(runs.c.started_at, moment)
        with writing(self._engine) as connection:
            changed = connection.execute(update(runs).where(runs.c.id == run).values(values))
            if changed.rowcount == 0:
                raise _no_run(run)

    def append(self, run: str, kind: str, data: Mapping[str, Any]) -> int:
        """Add an event to a run (by its id) and return its number: 1, 2, ... without gaps.

        Raises:
            UnknownRun: if there is no such run.
            NotJson: if ``data`` is not JSON.
        """
        row = {"run": run, "kind": kind, "data": canonical_json(data, "data"), "created_at": now()}
        with writing(self._engine) as connection:
            lock(connection, f"weft events {run}")
            _require_run(connection, run)
            last = select(func.max(events.c.seq)).where(events.c.run == run)
            seq: int = (connection.scalar(last) or 0) + 1
            connection.execute(insert(events).values(row | {"seq": seq}))
        return seq

    def events(self, run: str, after: int = 0) -> list[Event]:
        """Return the events of a run (by its id) with numbers above ``after``, in order.

        Raises:
            UnknownRun: if there is no such run.
        """
        query = (
            select(events).where(events.c.run == run, events.c.seq > after).order_by(events.c.seq)
        )
        with self._engine.connect() as connection:
            _require_run(connection, run)
            return [
                Event(row.seq, row.kind, json.loads(row.data), row.created_at)
                for row in connection.execute(query)
            ]


def _runs() -> Select[Any]:
    return select(*(column for column in runs.columns if column.name != "number"))


def _run(row: Row[Any]) -> RunRecord:
    config, plan = json.loads(row.config), json.loads(row.plan)
    return RunRecord(**row._asdict() | {"config": config, "plan": plan})


def _require_run(connection: Connection, run: str) -> None:
    if connection.execute(select(runs.c.id).where(runs.c.id == run)).first() is None:
        raise _no_run(run)


def _no_run(run: str) -> UnknownRun:
    return UnknownRun(f"no run has the id {run!r}; create it first, or give its full id")
