"""Whose updates a version holds, itself or through what it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from storage.database import insert_missing
from storage.lineage import current_aliases, reach
from storage.schema import contributions, promotions, versions


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where an alias points.

    Attributes:
        pointer: such as ``bot@production``.
        version: id of the version that it points at.
    """

    pointer: str
    version: str


def record_contributions(connection: Connection, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Make versions findable by the clients whose updates their recipes list.

    Args:
        connection: of a transaction that writes.
        recipes: by version, some hundreds at most.
    """
    found = {version: names for version, one in recipes.items() if (names := contributors(one))}
    if found:
        numbers = select(versions.c.id, versions.c.number).where(versions.c.id.in_(found))
        rows = [
            {"client": client, "number": number}
            for version, number in connection.execute(numbers)
            for client in sorted(found[version])
        ]
        insert_missing(connection, contributions, rows)


def contributors(recipe: Mapping[str, Any]) -> set[str]:
    """Return the clients whose updates a recipe lists."""
    return {
        leaf["client"]
        for leaf in recipe.get("updates", ())
        if isinstance(leaf, Mapping) and isinstance(leaf.get("client"), str)
    }


def deployed_with(connection: Connection, client: str) -> list[Deployment]:
    """Return the deployed versions that an update of ``client`` went into, sorted by alias.

    It follows every kind of edge from the client's updates on: linear in what came of them, and in
    the aliases that there are.
    """
    own = select(contributions.c.number).where(contributions.c.client == client)
    reached = reach(connection, own, "children")
    query = current_aliases().add_columns(versions.c.number)
    current = connection.execute(query.join(versions, versions.c.id == promotions.c.version))
    found = sorted(
        (f"{name}@{alias}", v) for name, alias, v, number in current if number in reached
    )
    return [Deployment(pointer, version) for pointer, version in found]


def contributed(connection: Connection, client: str) -> bool:
    """Return whether any version was made with an update of ``client``."""
    query = select(contributions.c.client).where(contributions.c.client == client).limit(1)
    return connection.scalar(query) is not None
