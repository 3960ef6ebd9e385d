"""The tables, as SQLAlchemy sees them; ``migrations/`` creates them.

Rows are only ever added, but for a run's progress, a registered client, a population's budget,
whether a spend counts, which blobs are condemned, who serves what and what is seen of nodes:
history is not rewritten. ``number`` columns give the order of insertion, which no clock can
disturb. A column with ``info=BLOB`` holds a blob's digest: :mod:`storage.references` finds it by
that, so that ``fsck``, ``gc`` and backups know it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

from storage.canonical import RecordCorrupt

HEAD = "0013"
"""The newest migration; a test holds it equal to the newest file of ``migrations/versions``."""

BLOB = {"blob": True}
"""Marks a column that holds a blob's digest, or null. Who writes a row with one calls
:func:`storage.references.claim` in the same transaction."""


class Timestamp(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite, which knows no zones, stores it without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what is stored."""
        return None if value is None else value.astimezone(UTC)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        """Return what reads a value.

        Raises:
            RecordCorrupt: when it reads one that is no time any more.
        """
        process = super().result_processor(dialect, coltype)

        def read(value: Any) -> datetime | None:
            try:
                moment: datetime | None = process(value) if process else value
            except (ValueError, TypeError):
                raise RecordCorrupt(
                    f"the database holds the time {value!r}, which is none: it is damaged; "
                    "restore it from a backup"
                ) from None
            return moment

        return read

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return what is read."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


# Named constraints: SQLite can only drop what has a name.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

versions = Table(
    "versions",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("tensors", String, nullable=False, info=BLOB),
    Column("auxiliary", String, info=BLOB),
    Column("memory", String, info=BLOB),
    Column("recipe", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# By numbers, which are a tenth of the bytes of ids, and lie together where versions were committed
# one after the other: a lineage of thousands is in few pages.
parents = Table(
    "version_parents",
    metadata,
    Column("child", Integer, ForeignKey("versions.number"), primary_key=True),
    Column("parent", Integer, ForeignKey("versions.number"), primary_key=True),
    Column("kind", String, primary_key=True),
    sqlite_with_rowid=False,
)

# From a parent to all else of its edges, without a look at the table.
Index(None, parents.c.parent, parents.c.child, parents.c.kind)

metrics = Table(
    "metrics",
    metadata,
    Column("version", String, ForeignKey("versions.id"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("value", Float(53), nullable=False),
)

names = Table(
    "names",
    metadata,
    Column("name", String, primary_key=True),
    Column("created_at", Timestamp, nullable=False),
)

# Names that begin alike, whatever the collation of a PostgreSQL database.
Index("ix_names_prefix", names.c.name, postgresql_ops={"name": "text_pattern_ops"})

named_versions = Table(
    "named_versions",
    metadata,
    Column("name", String, ForeignKey("names.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", String, ForeignKey("versions.id"), nullable=False, index=True),
    Column("created_at", Timestamp, nullable=False),
)

# The newest row of a (name, alias) says where the alias points; the others are its history.
promotions = Table(
    "promotions",
    metadata,
    Column("name", String, ForeignKey("names.name"), primary_key=True),
    Column("alias", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", String, ForeignKey("versions.id"), nullable=False, index=True),
    Column("who", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("kind", String, nullable=False, server_default="promote"),
    Column("evidence", Text),
)

# The newest row of a name says what is asked of its versions; without a document, nothing is. No
# foreign key: a name may have a gate before it has a version.
gates = Table(
    "gates",
    metadata,
    Column("name", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("document", Text),
    Column("who", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# The newest row of a version says whether it is yanked.
yanks = Table(
    "yanks",
    metadata,
    Column("version", String, ForeignKey("versions.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("yanked", Boolean, nullable=False),
    Column("who", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# Whose updates went into a version itself: what its recipe says, where it can be searched.
contributions = Table(
    "contributions",
    metadata,
    Column("client", String, primary_key=True),
    Column("number", Integer, ForeignKey("versions.number"), primary_key=True, autoincrement=False),
)

# No foreign key: what is signed may be the move of an alias, by its content.
signatures = Table(
    "signatures",
    metadata,
    Column("kind", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("signature", String, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# A client that withdrew is no row of `clients` any more.
withdrawals = Table(
    "withdrawals",
    metadata,
    Column("client", String, primary_key=True),
    Column("who", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

populations = Table(
    "populations",
    metadata,
    Column("name", String, primary_key=True),
    Column("epsilon", Float(53)),
    Column("delta", Float(53)),
    Column("created_at", Timestamp, nullable=False),
    Column("policy", String, nullable=False, server_default="refuse"),
)

# Populations that share records, each pair both ways round. No foreign keys: a simulated client's
# population has no row, and what is shared is shared for ever.
related = Table(
    "related_populations",
    metadata,
    Column("population", String, primary_key=True),
    Column("other", String, primary_key=True),
    Column("created_at", Timestamp, nullable=False),
)

# No foreign keys, as for spends: no ε bounds what these tell, and that outlives the client.
unprotected_runs = Table(
    "unprotected_runs",
    metadata,
    Column("population", String, primary_key=True),
    Column("run", String, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("who", String, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

clients = Table(
    "clients",
    metadata,
    Column("name", String, primary_key=True),
    Column("population", String, ForeignKey("populations.name"), nullable=False, index=True),
    Column("data", Text, nullable=False),
    Column("fields", Text, nullable=False),
    Column("num_examples", Integer),
    Column("labels", Text, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("node", String, index=True),
    Column("holdout", Text),
)

# The newest row of a name says who a site's node is and whether it is let in; the others are its
# history, which is never forgotten: nor are keys that are trusted no more.
nodes = Table(
    "nodes",
    metadata,
    Column("name", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("status", String, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("fingerprint", String, nullable=False, index=True),
    Column("expires_at", Timestamp, nullable=False),
    Column("labels", Text, nullable=False),
    Column("budgets", Text, nullable=False),
    Column("document", Text, nullable=False),
    Column("who", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# What the SuperLink of this place says of them: nothing that another place's would.
node_sightings = Table(
    "node_sightings",
    metadata,
    Column("node", String, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("flower_id", String),
    Column("seen_at", Timestamp),
    Column("weft", String),
    Column("flwr", String),
    Column("problem", Text),
)

# No foreign keys: a spend outlives the client, and is recorded even where nothing else is known.
spends = Table(
    "spends",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("event", String, nullable=False, unique=True),
    Column("population", String, nullable=False, index=True),
    Column("client", String, nullable=False),
    Column("run", String, nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("assignment", String, nullable=False),
    Column("mechanism", String, nullable=False),
    Column("unit", String, nullable=False),
    Column("adjacency", String, nullable=False),
    Column("parameters", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("void", Text),
)

# A row is what its events amount to (:mod:`storage.projection`), but for the lease, which is
# renewed without an event.
runs = Table(
    "runs",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("name", String, nullable=False, index=True),
    Column("status", String, nullable=False),
    Column("config", Text, nullable=False),
    Column("version", String, ForeignKey("versions.id"), index=True),
    Column("round", Integer, nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("error", Text),
    Column("created_at", Timestamp, nullable=False),
    Column("started_at", Timestamp),
    Column("finished_at", Timestamp),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("labels", Text, nullable=False, server_default="{}"),
    Column("owner", String),
    Column("token", Integer, nullable=False, server_default="0"),
    Column("lease_until", Timestamp),
    Column("wanted", String, nullable=False, server_default="run"),
    Column("seq", Integer, nullable=False, server_default="0"),
)

# What a claim reads of the runs that it does not take: a long queue costs it no look at a row.
Index(None, runs.c.status, runs.c.priority, runs.c.number, runs.c.labels)
# A page of the runs that stand alike, newest first.
Index(None, runs.c.status, runs.c.number)

# Apart from the runs, whose rows each event writes anew: for 10,000 clients a plan is megabytes.
plans = Table(
    "plans",
    metadata,
    Column("run", String, ForeignKey("runs.id"), primary_key=True),
    Column("plan", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("run", String, ForeignKey("runs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("data", Text, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("changes", Text, nullable=False, server_default="{}"),
)

# Accepted updates whose bytes a run keeps, and those whose client withdrew, which have no `blob`
# any more. Of what is kept no longer there is no row; recipes have the digests for ever. Each run
# keeps its own: another may have made the same versions of them, and keep them less long.
kept_updates = Table(
    "kept_updates",
    metadata,
    Column("digest", String, primary_key=True),
    Column("run", String, ForeignKey("runs.id"), primary_key=True, index=True),
    Column("client", String, nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("version", String, ForeignKey("versions.id"), nullable=False, index=True),
    Column("blob", String, info=BLOB),
)

# Blobs that nothing reached when `gc` looked. A row without `removed_at` may be rescued, which
# deletes it; one with it says for ever when the blob was removed.
condemned = Table(
    "condemned_blobs",
    metadata,
    Column("digest", String, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("condemned_at", Timestamp, nullable=False),
    Column("removed_at", Timestamp),
)

# Servers that follow an alias, as they last said. No foreign keys: a server may wait for an alias
# that is not there yet, and what it says of itself must never stand in the way of anything.
followers = Table(
    "followers",
    metadata,
    Column("server", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("alias", String, primary_key=True),
    Column("url", String, nullable=False),
    Column("version", String),
    Column("problem", Text),
    Column("lease_s", Float(53), nullable=False),
    Column("registered_at", Timestamp, nullable=False),
    Column("seen_at", Timestamp, nullable=False),
)
