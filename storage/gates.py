"""The gates of names: what is asked of a version before an alias is moved to it, and their history.

What is in a gate is its reader's to know; here it is JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select

from storage.canonical import canonical_json, read_json
from storage.database import lock, writing
from storage.records import now
from storage.refs import check_name, quoted
from storage.schema import gates


class UnknownGate(LookupError):
    """A name has no gate."""


@dataclass(frozen=True, slots=True)
class GateRow:
    """One state of a name's gate.

    Attributes:
        name: whose gate.
        number: of the state, from 1.
        document: what is asked, JSON; None from when it was removed.
        who: who said so.
        why: as they say; may be empty.
        created_at: when, UTC.
    """

    name: str
    number: int
    document: Mapping[str, Any] | None
    who: str
    why: str
    created_at: datetime

    @property
    def digest(self) -> str:
        """What a decision by this gate names it by: sha256 of its canonical JSON."""
        return gate_digest(self.document)


def gate_digest(document: Mapping[str, Any] | None) -> str:
    """Return the sha256 of a gate's canonical JSON."""
    return hashlib.sha256(canonical_json(document, "a gate").encode()).hexdigest()


class Gates:
    """The gates of all names, with what they were.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the adapter store.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def set(
        self, name: str, document: Mapping[str, Any] | None, *, who: str, why: str = ""
    ) -> GateRow:
        """Give a name a gate from now on, or none (``document`` None), and return the new state.

        Idempotent: what it is already stays as it is, with its number.

        Raises:
            BadName: if the name cannot be one.
            NotJson: if the document is not JSON.
            UnknownGate: if there is none to remove.
        """
        check_name("name", name)
        text = None if document is None else canonical_json(document, "a gate")
        with writing(self._engine) as connection:
            lock(connection, f"weft gate {name}")
            last = _newest(connection, name)
            if last is None and document is None:
                raise _none(name)
            if last is not None and last.document == document:
                if document is None:
                    raise _none(name)
                return last
            made = GateRow(name, last.number + 1 if last else 1, document, who, why, now())
            connection.execute(
                insert(gates).values(
                    name=name,
                    number=made.number,
                    document=text,
                    who=who,
                    why=why,
                    created_at=made.created_at,
                )
            )
            return made

    def find(self, name: str) -> GateRow | None:
        """Return the gate that a name has now, or None."""
        with self._engine.connect() as connection:
            found = _newest(connection, name)
        return None if found is None or found.document is None else found

    def get(self, name: str) -> GateRow:
        """Return the gate that a name has now.

        Raises:
            UnknownGate: if it has none.
        """
        found = self.find(name)
        if found is None:
            raise _none(name)
        return found

    def history(self, name: str) -> list[GateRow]:
        """Return what a name's gate was, newest first; empty if it never had one."""
        with self._engine.connect() as connection:
            query = select(gates).where(gates.c.name == name).order_by(gates.c.number.desc())
            return [_row(row) for row in connection.execute(query)]


def _newest(connection: Connection, name: str) -> GateRow | None:
    last = select(func.max(gates.c.number)).where(gates.c.name == name).scalar_subquery()
    row = connection.execute(
        select(gates).where(gates.c.name == name, gates.c.number == last)
    ).first()
    return None if row is None else _row(row)


def _row(row: Any) -> GateRow:
    document = None if row.document is None else read_json(row.document, f"the gate of {row.name}")
    return GateRow(row.name, row.number, document, row.who, row.why, row.created_at)


def _none(name: str) -> UnknownGate:
    return UnknownGate(f"{quoted(name)} has no gate; give it one with: weft gate set {name} FILE")
