"""Pages of names and of versions, each read through an index however long the store is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    exists,
    func,
    select,
    text,
)

from storage.lineage import current_aliases
from storage.schema import contributions, named_versions, names, promotions, versions


@dataclass(frozen=True, slots=True)
class NameRow:
    """One name of the store.

    Attributes:
        name: such as ``task-1``.
        num_versions: how many versions it numbers, >= 1; the newest is ``name:v{num_versions}``.
        newest: id of the newest, yanked or not.
        aliases: id by alias, such as ``{"production": "733e..."}``.
    """

    name: str
    num_versions: int
    newest: str
    aliases: Mapping[str, str]


def page_of_names(
    connection: Connection, prefix: str = "", after: str = "", limit: int = 100
) -> list[NameRow]:
    """Return names in the order of their bytes.

    Args:
        connection: to the database.
        prefix: with which they begin; it has the letters of a name.
        after: the name that the last page ended with, or "".
        limit: most names.
    """
    compared = "~" if connection.dialect.name == "postgresql" else ""  # bytes, on both databases
    query = select(names.c.name).where(names.c.name.op(f"{compared}>{compared}")(after))
    if prefix:
        first, end = f"{compared}>={compared}", f"{compared}<{compared}"
        query = query.where(names.c.name.op(first)(prefix), names.c.name.op(end)(prefix + "{"))
    order = text("name USING ~<~") if compared else names.c.name
    found = connection.scalars(query.order_by(order).limit(limit)).all()
    later = named_versions.alias("later")
    newer = exists().where(
        later.c.name == named_versions.c.name, later.c.number > named_versions.c.number
    )
    newest = {
        row.name: row
        for row in connection.execute(
            select(named_versions).where(named_versions.c.name.in_(found), ~newer)
        )
    }
    pointing: dict[str, dict[str, str]] = {name: {} for name in found}
    for name, alias, version in connection.execute(
        current_aliases().where(promotions.c.name.in_(found)).order_by(promotions.c.alias)
    ):
        pointing[name][alias] = version
    return [
        NameRow(name, newest[name].number, newest[name].version, pointing[name]) for name in found
    ]


def page_of_versions(
    connection: Connection, name: str | None, client: str | None, before: str | None, limit: int
) -> Sequence[str]:
    """Return ids of versions, newest first; those of a name by the highest number they have there.

    Args:
        connection: to the database.
        name: only its versions; None for those of all names and of none.
        client: only versions that a round with an update of this client made; None for all.
        before: id of the version that the last page ended with, or None.
        limit: most versions.
    """
    query: Select[Any]
    number: ColumnElement[int]
    if name is None:
        query, number = select(versions.c.id), versions.c.number
        start = select(number).where(versions.c.id == before)
        if client is not None:  # by the index's own column, which gives the order
            number = contributions.c.number
            own = contributions.c.number == versions.c.number
            query = query.join(contributions, own).where(contributions.c.client == client)
    else:
        query, number = _of_name(name), named_versions.c.number
        start = select(func.max(number)).where(
            named_versions.c.name == name, named_versions.c.version == before
        )
        if client is not None:
            query = query.where(_contributed(client))
    if before is not None:
        query = query.where(number < start.scalar_subquery())
    return connection.scalars(query.order_by(number.desc()).limit(limit)).all()


def _of_name(name: str) -> Select[str]:
    later = named_versions.alias("later")
    again = exists().where(
        later.c.version == named_versions.c.version,
        later.c.name == name,
        later.c.number > named_versions.c.number,
    )
    return select(named_versions.c.version).where(named_versions.c.name == name, ~again)


def _contributed(client: str) -> ColumnElement[bool]:
    return exists().where(
        contributions.c.client == client,
        contributions.c.number == versions.c.number,
        versions.c.id == named_versions.c.version,
    )
