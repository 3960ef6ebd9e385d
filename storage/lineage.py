"""What a version is, and the graph of what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    ScalarSelect,
    Select,
    exists,
    func,
    literal,
    select,
    true,
)

from storage.canonical import canonical_json, read_json
from storage.membership import is_among
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
    "basis",
)


Towards: TypeAlias = Literal["parents", "children"]
"""Which way a lineage is followed: to what a version is made of, or to what was made of it."""


class VersionCorrupt(RuntimeError):
    """A version's row is not what its id says."""


class Parent(NamedTuple):
    """What a version comes from, and how (one of :data:`PARENT_KINDS`)."""

    id: str
    kind: str


class Content(NamedTuple):
    """The digests of what a version is made of; None where it has none."""

    tensors: str
    auxiliary: str | None
    memory: str | None


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
    start = _number_of(connection, root)
    if depth is None:
        reached = reach(connection, select(literal(start)), towards)
    else:
        steps = _steps(connection, start, towards, depth)
        reached = {start, *_ends(steps)}
    nodes = _by_id(_loaded(connection, versions.c.number, sorted(reached)))
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

    Reads of a version only its id: one recursive query, or one query a step where ``depth`` is
    given, and two more.

    Raises:
        VersionCorrupt: if an edge names a version that has no row.
    """
    start = _number_of(connection, root)
    if depth is None:
        reached = reach(connection, select(literal(start)), towards)
        steps = _edges(connection, _near(towards), sorted(reached))
    else:
        steps = _steps(connection, start, towards, depth)
    ids = _ids(connection, _ends(steps))
    return [Edge(ids[child], ids[parent], kind) for child, parent, kind in steps]


def reach(connection: Connection, start: Select[int], towards: Towards) -> set[int]:
    """Return the numbers of the versions that ``start`` selects, and of all reached from them.

    One recursive query; linear in the edges.
    """
    near, far = _near(towards), _near("children" if towards == "parents" else "parents")
    found = start.cte("reached", recursive=True)
    [number] = found.c
    step = select(far).where(near == number)
    if connection.dialect.name == "postgresql":
        # It does not know that a step's rows are few, and would read all edges at each step.
        each = step.correlate(found).offset(0).lateral()
        step = select(each.c[far.name]).select_from(found.join(each, true()))
    return set(connection.scalars(select(found.union(step))).all())


def _near(towards: Towards) -> Column[int]:
    """Return the end of an edge from which it is followed."""
    return parents.c.child if towards == "parents" else parents.c.parent


def _steps(
    connection: Connection, start: int, towards: Towards, depth: int
) -> list[tuple[int, int, str]]:
    """Return the edges on the ways of at most ``depth`` steps, by numbers."""
    walked: list[tuple[int, int, str]] = []
    seen, frontier = {start}, [start]
    for _ in range(depth):
        step = _edges(connection, _near(towards), frontier)
        walked += step
        frontier = sorted({edge[1] if towards == "parents" else edge[0] for edge in step} - seen)
        if not frontier:
            break
        seen.update(frontier)
    return walked


def _ends(edges: Iterable[tuple[int, int, str]]) -> set[int]:
    return {number for child, parent, _ in edges for number in (child, parent)}


def _edges(
    connection: Connection, near: Column[int], numbers: Sequence[int]
) -> list[tuple[int, int, str]]:
    """Return (child, parent, kind) of the edges that have one of ``numbers`` at this end."""
    query = select(parents.c.child, parents.c.parent, parents.c.kind)
    rows = connection.execute(query.where(is_among(connection, near, numbers))).all()
    return [(child, parent, kind) for child, parent, kind in rows]


def _number_of(connection: Connection, version: str) -> int:
    query = select(versions.c.number).where(versions.c.id == version)
    number: int | None = connection.scalar(query)
    if number is None:
        raise _no_row(f"version {version[:12]}")
    return number


def _ids(connection: Connection, numbers: Collection[int]) -> dict[int, str]:
    """Return the ids of versions by their numbers."""
    query = select(versions.c.number, versions.c.id)
    rows = connection.execute(query.where(is_among(connection, versions.c.number, sorted(numbers))))
    found = {number: version for number, version in rows.all()}  # noqa: C416  (mypy: rows are no pairs)
    for lost in (number for number in numbers if number not in found):
        raise _no_row(f"the version of number {lost}")
    return found


def load_versions(connection: Connection, ids: Sequence[str]) -> dict[str, Version]:
    """Return the versions called ``ids``, by id, newest first: children before their parents.

    Six queries.

    Raises:
        VersionCorrupt: if a row was changed, or removed, behind weft's back.
    """
    by_id = _by_id(_loaded(connection, versions.c.id, ids))
    for lost in (id_ for id_ in ids if id_ not in by_id):
        raise _no_row(f"version {lost[:12]}")
    return by_id


def load_content(connection: Connection, id_: str) -> tuple[Content, list[Parent]]:
    """Return the digests and parents of the version called ``id_``, checked as all its content is.

    Two queries: what a version is called, and what was measured of it, is not read.

    Raises:
        VersionCorrupt: as :func:`load_versions`.
    """
    row = connection.execute(select(versions).where(versions.c.id == id_)).first()
    if row is None:
        raise _no_row(f"version {id_[:12]}")
    content = Content(row.tensors, row.auxiliary, row.memory)
    edges = select(versions.c.id, parents.c.kind).join(
        parents, versions.c.number == parents.c.parent
    )
    rows = connection.execute(edges.where(parents.c.child == row.number)).all()
    came_from = sorted(Parent(*edge) for edge in rows)
    _check(id_, content, came_from, row.recipe)
    return content, came_from


def parents_of(connection: Connection, numbers: Sequence[int]) -> dict[int, list[Parent]]:
    """Return the parents of versions, sorted, by the number of the child."""
    edges = select(parents.c.child, versions.c.id, parents.c.kind)
    query = edges.join(versions, versions.c.number == parents.c.parent)
    found = _grouped(connection, query.where(is_among(connection, parents.c.child, numbers)))
    return {child: [Parent(*pair) for pair in pairs] for child, pairs in found.items()}


def _by_id(found: Mapping[int, Version]) -> dict[str, Version]:
    return {found[number].id: found[number] for number in sorted(found, reverse=True)}


def _no_row(what: str) -> VersionCorrupt:
    return VersionCorrupt(
        f"{what} is listed and has no row: the database was changed outside weft; "
        "restore it from a backup"
    )


def _loaded(connection: Connection, key: Column[Any], values: Sequence[Any]) -> dict[int, Version]:
    """Return the versions that have these values of a unique column, by their numbers."""
    query = select(versions).where(is_among(connection, key, values))
    return _load(connection, connection.execute(query).all())


def _load(connection: Connection, rows: Sequence[Row[Any]]) -> dict[int, Version]:
    """Return the versions that have these rows, by their numbers."""
    ids = [row.id for row in rows]
    came_from = parents_of(connection, [row.number for row in rows])
    measured = _grouped(
        connection,
        select(metrics.c.version, metrics.c.key, metrics.c.value).where(
            is_among(connection, metrics.c.version, ids)
        ),
    )
    named = _grouped(
        connection,
        select(named_versions.c.version, named_versions.c.name, named_versions.c.number).where(
            is_among(connection, named_versions.c.version, ids)
        ),
    )
    aliased = _grouped(
        connection,
        select(promotions.c.version, promotions.c.name, promotions.c.alias).where(
            is_among(connection, promotions.c.version, ids), is_newest_move()
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
                parents=tuple(came_from.get(row.number, ())),
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
        .where(is_among(connection, yanks.c.version, ids))
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
) -> defaultdict[Any, list[tuple[Any, Any]]]:
    """Return the last two columns by the first, sorted here: databases sort text differently."""
    groups: defaultdict[Any, list[tuple[Any, Any]]] = defaultdict(list)
    for key, *pair in sorted(tuple(row) for row in connection.execute(query).all()):
        groups[key].append((pair[0], pair[1]))
    return groups


def _verified(version: Version, recipe: str) -> Version:
    content = Content(version.tensors, version.auxiliary, version.memory)
    _check(version.id, content, version.parents, recipe)
    return version


def _check(id_: str, content: Content, came_from: Sequence[Parent], recipe: str) -> None:
    if _hashed([*content, came_from], recipe) != id_:
        raise VersionCorrupt(
            f"version {id_[:12]} does not hash to its id: its row or its parents were "
            "changed outside weft; restore the database from a backup"
        )
