"""A store of a million versions, made by bulk insert.

Families of 1,000 levels of two versions, each of which has both versions of the level before as
parents, under one last version with 2,000 ancestors. Names number 100 versions each, and have an
alias that moved three times; every version was made with updates of two of 1,000 clients.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from storage import schema
from storage.canonical import canonical_json
from storage.lineage import Parent, version_id

LEVELS = 1000
FAMILY = 2 * LEVELS + 1
LEVELS_OF_A_NAME = 50  # two versions each
CLIENTS = 1000
PART = 20_000  # versions that are inserted at once
TIME = "2026-01-02 00:00:00.000000"
TABLES = (
    "versions",
    "version_parents",
    "contributions",
    "names",
    "named_versions",
    "promotions",
)


@dataclass(frozen=True)
class Filled:
    """What is in a store.

    Attributes:
        versions: how many.
        edges: how many.
        names: of all names, in order of insertion.
        tops: ids of the versions with 2,000 ancestors.
        ids: some ids.
        seconds: that it took to insert them.
    """

    versions: int
    edges: int
    names: list[str]
    tops: list[str]
    ids: list[str]
    seconds: float


Row = tuple[str, dict[str, Any]]


def rows(families: int) -> Iterator[Row]:
    """Yield (table, row), level by level over all families: a family's rows lie far apart."""
    number = 0
    last: list[dict[str, int]] = [{} for _ in range(families)]  # numbers by id
    for level in range(LEVELS + 1):
        for family in range(families):
            made = {}
            for side in range(2 if level < LEVELS else 1):
                number += 1
                kind = "merge" if level == LEVELS else "round"
                lineage = sorted(Parent(parent, kind) for parent in last[family])
                clients = [f"client-{(number * k) % CLIENTS}" for k in (1, 7)]
                recipe = {
                    "kind": kind,
                    "round": level,
                    "family": [family, side],
                    "updates": [{"client": c, "digest": f"{number:064x}"} for c in clients],
                }
                digest = hashlib.sha256(b"%d" % number).hexdigest()
                version = version_id(digest, None, None, lineage, recipe)
                made[version] = number
                yield from _version(number, version, digest, recipe)
                for parent in lineage:
                    edge = {"child": number, "parent": last[family][parent.id]}
                    yield "version_parents", {**edge, "kind": parent.kind}
                yield from _named(family, level, side, version)
            last[family] = made


def _version(number: int, version: str, digest: str, recipe: dict[str, Any]) -> Iterator[Row]:
    yield (
        "versions",
        {
            "number": number,
            "id": version,
            "tensors": digest,
            "auxiliary": None,
            "memory": None,
            "recipe": canonical_json(recipe, "recipe"),
            "created_at": TIME,
        },
    )
    for client in sorted({leaf["client"] for leaf in recipe["updates"]}):
        yield "contributions", {"client": client, "number": number}


def _named(family: int, level: int, side: int, version: str) -> Iterator[Row]:
    name = f"team-{family:04d}.{min(level, LEVELS - 1) // LEVELS_OF_A_NAME:02d}"
    at = level % LEVELS_OF_A_NAME if level < LEVELS else LEVELS_OF_A_NAME
    number = 2 * at + side + 1
    if number == 1:
        yield "names", {"name": name, "created_at": TIME}
    row = {"name": name, "number": number, "version": version, "created_at": TIME}
    yield "named_versions", row
    if side == 0 and at in (0, 20, 40):
        move = {"name": name, "alias": "production", "number": at // 20 + 1, "version": version}
        more = {"who": "bench", "why": "", "created_at": TIME, "kind": "promote"}
        yield "promotions", move | more


def fill(engine: Engine, versions: int) -> Filled:
    """Insert whole families until there are so many versions."""
    families = max(1, versions // FAMILY)
    order = [t for t in schema.metadata.sorted_tables if t.name in TABLES]
    waiting: dict[str, list[dict[str, Any]]] = {table.name: [] for table in order}
    counts = dict.fromkeys(waiting, 0)
    names, tops, ids = [], [], []
    began = time.perf_counter()
    with _inserting(engine) as insert:

        def flush() -> None:
            for table in order:
                if waiting[table.name]:
                    insert(table.name, waiting[table.name])
                    waiting[table.name].clear()

        for table, row in rows(families):
            if table == "versions":
                if len(waiting[table]) == PART:  # all rows of the versions before are there
                    flush()
                    print(f"\r{counts[table]:,} versions", end="", file=sys.stderr, flush=True)
                if counts[table] % 997 == 0:
                    ids.append(row["id"])
                if counts[table] >= families * (FAMILY - 1):
                    tops.append(row["id"])
            elif table == "names":
                names.append(row["name"])
            waiting[table].append(row)
            counts[table] += 1
        flush()
    print("\r", end="", file=sys.stderr)
    seconds = time.perf_counter() - began
    return Filled(counts["versions"], counts["version_parents"], names, tops, ids, seconds)


@contextmanager
def _inserting(engine: Engine) -> Iterator[Callable[[str, list[dict[str, Any]]], None]]:
    """Yield what inserts rows into a table, as fast as each database does."""
    raw = engine.raw_connection()
    connection: Any = raw.driver_connection
    if engine.dialect.name == "sqlite":
        for pragma in ("foreign_keys = OFF", "synchronous = OFF", "cache_size = -1000000"):
            connection.execute(f"PRAGMA {pragma}")

        def insert(table: str, found: list[dict[str, Any]]) -> None:
            columns = list(found[0])
            marks = ", ".join("?" for _ in columns)
            statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
            connection.execute("BEGIN")
            connection.executemany(statement, [tuple(row.values()) for row in found])
            connection.execute("COMMIT")

        yield insert
        raw.invalidate()  # its settings are not for readers
        return

    def copy(table: str, found: list[dict[str, Any]]) -> None:
        statement = f"COPY {table} ({', '.join(found[0])}) FROM STDIN"
        with connection.cursor() as cursor, cursor.copy(statement) as stream:
            for row in found:
                stream.write_row(tuple(row.values()))
        connection.commit()

    yield copy
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")  # as the server does by itself after a while
    raw.invalidate()
