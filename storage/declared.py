"""What sites let their own data's populations spend: what nobody can raise from afar."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, func, select

from storage.canonical import read_json
from storage.schema import nodes


class Declared(NamedTuple):
    """What a site declared of a population.

    Attributes:
        node: of the site.
        epsilon: that all runs together may spend, > 0.
        delta: in (0, 1).
    """

    node: str
    epsilon: float
    delta: float


def declared(connection: Connection, population: str) -> Declared | None:
    """Return what the site that has a population's data let it spend, or None for no bound."""
    let_in = newest_nodes().where(nodes.c.status.in_(("enabled", "disabled")))
    for row in connection.execute(let_in):
        budget = read_json(row.budgets, f"node {row.name}").get(population)
        if budget is not None:
            return Declared(row.name, *budget)
    return None


def newest_nodes() -> Select[Any]:
    """Select the newest row of every node, by name."""
    last = select(nodes.c.name, func.max(nodes.c.number).label("number"))
    newest = last.group_by(nodes.c.name).subquery()
    same = and_(newest.c.name == nodes.c.name, newest.c.number == nodes.c.number)
    return select(nodes).join(newest, same).order_by(nodes.c.name)
