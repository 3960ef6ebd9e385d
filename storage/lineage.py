"""What a version is, and the graph of what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    exists,
    func,
    literal,
    select,
)

from storage.canonical import canonical_json, read_json
from storage.schema import metrics, named_versions, parents, promotions, versions, yanks

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


Towards: TypeAlias = Literal["parents", "children"]
"""Which way a lineage is followed: to what a version is made of, or to what was made of it."""

_PART = 1000  # ids in one statement: databases limit its parameters


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
        yanked: why it was taken out of use, or None.
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
    yanked: str | None = None


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
    return _hashed([tensors, auxiliary, memory, parents], canonical_json(recipe, "recipe"))


def _hashed(head: list[Any], recipe: str) -> str:
    text = json.dumps(head, separators=(",", ":"))[:-1] + f",{recipe}]"
    return hashlib.sha256(text.encode()).hexdigest()


def trace(connection: Connection, root: str, towards: Towards, depth: int | None = None) -> Lineage:
    """Return what is reached from ``root`` in at most ``depth`` steps; None is all of it.

    Linear in the edges: shared ancestors are visited once.
    """
    reached = {root} | {id for edge in walk(connection, root, towards, depth) for id in edge[:2]}
    nodes = load_versions(connection, sorted(reached))
    edges = [
        Edge(node.id, parent.id, parent.kind)
        for node in nodes.values()
        for parent in node.parents
        if parent.id in nodes
    ]
    return Lineage(root, nodes, edges)


def walk(
    connection: Connection, root: str, towards: Towards, depth: int | None = None
) -> list[Edge]:
    """Return the edges on the ways of at most ``depth`` steps from ``root``, in no order.

    Reads no version: one recursive query, or one query a step where ``depth`` is given.
    """
    near, far = (parents.c.child, parents.c.parent)
    if towards == "children":
        near, far = far, near
    edges = select(parents.c.child, parents.c.parent, parents.c.kind)
    if depth is None:
        start = select(literal(root).label("id"))
        reached = start.cte("reached", recursive=True)
        reached = reached.union(select(far).where(near == reached.c.id))
        found = connection.execute(edges.join(reached, near == reached.c.id)).all()
        return [Edge._make(row) for row in found]
    walked: list[Edge] = []
    seen, frontier = {root}, [root]
    for _ in range(depth):
        step = [
            Edge(*row)
            for part in _parts(frontier)
            for row in connection.execute(edges.where(near.in_(part)))
        ]
        walked += step
        frontier = sorted({e.parent if towards == "parents" else e.child for e in step} - seen)
        if not frontier:
            break
        seen.update(frontier)
    return walked


def load_versions(connection: Connection, ids: Sequence[str]) -> dict[str, Version]:
    """Return the versions called ``ids``, by id, newest first: children before their parents.

    Six queries for every thousand versions.

    Raises:
        VersionCorrupt: if a row was changed, or removed, behind weft's back.
    """
    found: dict[int, Version] = {}
    for part in _parts(ids):
        found |= _load(connection, part)
    by_id = {found[number].id: found[number] for number in sorted(found, reverse=True)}
    for lost in (id_ for id_ in ids if id_ not in by_id):
        raise VersionCorrupt(
            f"version {lost[:12]} is listed and has no row: the database was changed outside weft; "
            "restore it from a backup"
        )
    return by_id


def _load(connection: Connection, ids: Sequence[str]) -> dict[int, Version]:
    """Return versions by their numbers."""
    rows = connection.execute(select(versions).where(versions.c.id.in_(ids))).all()
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
    aliased = _grouped(
        connection,
        select(promotions.c.version, promotions.c.name, promotions.c.alias).where(
            promotions.c.version.in_(ids), is_newest_move()
        ),
    )
    yanked = yanked_now(connection, ids)
    return {
        row.number: _verified(
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
                yanked=yanked.get(row.id),
            ),
            row.recipe,
        )
        for row in rows
    }


def current_aliases() -> Select[str, str, str]:
    """Return the query for (name, alias, version) of every alias as it points now."""
    query = select(promotions.c.name, promotions.c.alias, promotions.c.version)
    return query.where(is_newest_move())


def is_newest_move() -> ColumnElement[bool]:
    """Return the condition that a row of the promotions is where its alias points now."""
    later = promotions.alias("later")
    return ~exists().where(
        later.c.name == promotions.c.name,
        later.c.alias == promotions.c.alias,
        later.c.number > promotions.c.number,
    )


def yanked_now(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Return why each of the versions called ``ids`` is yanked, by id, of those that are."""
    newest = (
        select(yanks.c.version, func.max(yanks.c.number).label("number"))
        .where(yanks.c.version.in_(ids))
        .group_by(yanks.c.version)
        .subquery()
    )
    query = select(yanks.c.version, yanks.c.why).join(
        newest, (yanks.c.version == newest.c.version) & (yanks.c.number == newest.c.number)
    )
    return {row.version: row.why for row in connection.execute(query.where(yanks.c.yanked))}


def yank_standing(version: Any) -> ScalarSelect[bool]:
    """Return the query for whether the version in a column is yanked; NULL if it never was."""
    history = select(yanks.c.yanked).where(yanks.c.version == version)
    return history.order_by(yanks.c.number.desc()).limit(1).scalar_subquery()


def _grouped(
    connection: Connection, query: Select[Any, Any, Any]
) -> defaultdict[str, list[tuple[Any, Any]]]:
    """Return the last two columns by the first, sorted here: databases sort text differently."""
    groups: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for key, *pair in sorted(tuple(row) for row in connection.execute(query)):
        groups[key].append((pair[0], pair[1]))
    return groups


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield ``ids`` in parts that one statement takes."""
    return (ids[i : i + _PART] for i in range(0, len(ids), _PART))


def _verified(version: Version, recipe: str) -> Version:
    content = _hashed([version.tensors, version.auxiliary, version.memory, version.parents], recipe)
    if content != version.id:
        raise VersionCorrupt(
            f"version {version.id[:12]} does not hash to its id: its row or its parents were "
            "changed outside weft; restore the database from a backup"
        )
    return version
