"""What a version is, and the graph of what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Select, func, literal, select

from storage.canonical import canonical_json, read_json
from storage.schema import metrics, named_versions, parents, promotions, versions

PARENT_KINDS = (
    "init",
    "round",
    "continue",
    "stack",
    "offset",
    "merge",
    "recycle",
    "import",
    "unlearn",
)


class VersionCorrupt(RuntimeError):
    """A version's row is not what its id says."""


class Parent(NamedTuple):
    """What a version comes from, and how (one of :data:`PARENT_KINDS`)."""

    id: str
    kind: str


class Edge(NamedTuple):
    """One step of a lineage: ``child`` came from ``parent`` by ``kind``."""

    child: str
    parent: str
    kind: str


@dataclass(frozen=True, slots=True)
class Version:
    """One commit of the adapter store.

    Attributes:
        id: hash of the next five.
        tensors: digest of the adapter's tensors.
        auxiliary: digest of the rest of the strategy's state, or None.
        memory: digest of the regularisers' memory, or None.
        parents: sorted.
        recipe: all else that determines the bytes.
        metrics: measured values; they may be added to later.
        created_at: when it was first committed, UTC.
        names: such as ``("task-1:v3",)``, sorted by name and number.
        aliases: such as ``("task-1@production",)``, sorted.
    """

    id: str
    tensors: str
    auxiliary: str | None
    memory: str | None
    parents: tuple[Parent, ...]
    recipe: dict[str, Any]
    metrics: dict[str, float]
    created_at: datetime
    names: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The versions that one version came from, or that came from it.

    Attributes:
        root: the version it was asked for.
        nodes: by id, children before their parents; ``root`` is among them.
        edges: those between ``nodes``, in the order of ``nodes``.
    """

    root: str
    nodes: dict[str, Version]
    edges: list[Edge]


def version_id(
    tensors: str,
    auxiliary: str | None,
    memory: str | None,
    parents: Sequence[Parent],
    recipe: Any,
) -> str:
    """Return the id of a version with these digests, parents (sorted) and recipe.

    Raises:
        NotJson: if the recipe is not JSON.
    """
    # Each part apart, so that an error names "recipe" and not a place in the list.
    head = json.dumps([tensors, auxiliary, memory, parents], separators=(",", ":"))
    text = f"{head[:-1]},{canonical_json(recipe, 'recipe')}]"
    return hashlib.sha256(text.encode()).hexdigest()


def trace(
    connection: Connection,
    root: str,
    towards: Literal["parents", "children"],
    depth: int | None = None,
) -> Lineage:
    """Return what is reached from ``root`` in at most ``depth`` steps; None is all of it.

    One recursive query finds the ids; shared ancestors are visited once, so without ``depth`` the
    cost is linear in the edges.
    """
    nodes = load_versions(connection, _reachable(root, towards, depth))
    edges = [
        Edge(node.id, parent.id, parent.kind)
        for node in nodes.values()
        for parent in node.parents
        if parent.id in nodes
    ]
    return Lineage(root, nodes, edges)


def _reachable(
    root: str, towards: Literal["parents", "children"], depth: int | None
) -> Select[str]:
    near, far = parents.c.child, parents.c.parent
    if towards == "children":
        near, far = far, near
    start = select(versions.c.id).where(versions.c.id == root)
    if depth is None:
        reached = start.cte("reached", recursive=True)
        return select(reached.union(select(far).where(near == reached.c.id)).c.id)
    # With the distance in the row, UNION keeps a version once per distance.
    reached = start.add_columns(literal(0).label("distance")).cte("reached", recursive=True)
    step = select(far, reached.c.distance + 1).where(
        near == reached.c.id, reached.c.distance < depth
    )
    return select(reached.union(step).c.id)


def load_versions(connection: Connection, ids: Select[str] | Sequence[str]) -> dict[str, Version]:
    """Return the versions called ``ids``, by id, newest first: children before their parents.

    Five queries, however many versions.

    Raises:
        VersionCorrupt: if a row was changed behind weft's back.
    """
    rows = connection.execute(
        select(versions).where(versions.c.id.in_(ids)).order_by(versions.c.number.desc())
    ).all()
    came_from = _grouped(
        connection,
        select(parents.c.child, parents.c.parent, parents.c.kind).where(parents.c.child.in_(ids)),
    )
    measured = _grouped(
        connection,
        select(metrics.c.version, metrics.c.key, metrics.c.value).where(metrics.c.version.in_(ids)),
    )
    named = _grouped(
        connection,
        select(named_versions.c.version, named_versions.c.name, named_versions.c.number).where(
            named_versions.c.version.in_(ids)
        ),
    )
    current = current_aliases().subquery()
    aliased = _grouped(
        connection,
        select(current.c.version, current.c.name, current.c.alias).where(
            current.c.version.in_(ids)
        ),
    )
    return {
        row.id: _verified(
            Version(
                id=row.id,
                tensors=row.tensors,
                auxiliary=row.auxiliary,
                memory=row.memory,
                parents=tuple(Parent(*pair) for pair in came_from[row.id]),
                recipe=read_json(row.recipe, f"version {row.id[:12]}"),
                metrics=dict(measured[row.id]),
                created_at=row.created_at,
                names=tuple(f"{name}:v{number}" for name, number in named[row.id]),
                aliases=tuple(f"{name}@{alias}" for name, alias in aliased[row.id]),
            )
        )
        for row in rows
    }


def current_aliases() -> Select[str, str, str]:
    """Return the query for (name, alias, version) of every alias as it points now."""
    newest = (
        select(promotions.c.name, promotions.c.alias, func.max(promotions.c.number).label("number"))
        .group_by(promotions.c.name, promotions.c.alias)
        .subquery()
    )
    return select(promotions.c.name, promotions.c.alias, promotions.c.version).join(
        newest,
        (promotions.c.name == newest.c.name)
        & (promotions.c.alias == newest.c.alias)
        & (promotions.c.number == newest.c.number),
    )


def _grouped(
    connection: Connection, query: Select[Any, Any, Any]
) -> defaultdict[str, list[tuple[Any, Any]]]:
    """Return the last two columns by the first, sorted here: databases sort text differently."""
    groups: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for key, *pair in sorted(tuple(row) for row in connection.execute(query)):
        groups[key].append((pair[0], pair[1]))
    return groups


def _verified(version: Version) -> Version:
    content = version_id(
        version.tensors, version.auxiliary, version.memory, version.parents, version.recipe
    )
    if content != version.id:
        raise VersionCorrupt(
            f"version {version.id[:12]} does not hash to its id: its row or its parents were "
            "changed outside weft; restore the database from a backup"
        )
    return version
