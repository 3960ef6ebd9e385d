"""Opening SQLite or PostgreSQL, and the few places where the two differ."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    Table,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InterfaceError,
    OperationalError,
)

from storage.schema import HEAD

REVISION_TABLE = "weft_revision"
"""Where alembic writes the revision; its default name may be another program's already."""

BUSY_TIMEOUT_S = 30.0
SQLITE_CACHE_KIB = 32 * 1024
"""Most memory for pages, a connection: SQLite's own 2 MiB hold no lineage of a large store."""

_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic's `op` and `context` are globals of the process.
_ALEMBIC = threading.Lock()


class BadDatabaseUrl(ValueError):
    """The database url cannot be read, or names a database that weft does not use."""


class DatabaseUnavailable(ConnectionError):
    """The database cannot be reached, is none, or stopped working: what it was told is undone."""


class NewerSchema(RuntimeError):
    """The database was written by a newer weft."""


def open_database(url: str) -> Engine:
    """Return an engine on the database at ``url``, its tables created or brought up to date.

    Two processes may open a new database at once: one creates it, the other waits.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://USER:PASSWORD@HOST/DATABASE``.

    Raises:
        BadDatabaseUrl: if the url is neither.
        DatabaseUnavailable: if there is no such server, or the file is not a database.
        NewerSchema: if a newer weft wrote it.
    """
    engine = connect(url)
    try:
        with engine.connect() as connection:
            revision = _revision(connection)
        if revision != HEAD:
            _upgrade(engine)
    except DBAPIError as error:
        engine.dispose()
        reason = str(error.orig).strip().partition("\n")[0]
        raise DatabaseUnavailable(
            f"cannot open the store at {_place(engine.url)}: {reason}"
        ) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def connect(url: str) -> Engine:
    """Return an engine on the database at ``url``, whatever its tables are.

    Raises:
        BadDatabaseUrl: as :func:`open_database`.
        DatabaseUnavailable: if psycopg is not installed.
    """
    address = _parse(url)
    if address.get_backend_name() == "sqlite":
        if address.database and address.database != ":memory:":
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(address, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        event.listen(engine, "handle_error", _unavailable)
        return engine
    try:
        engine = create_engine(address, pool_pre_ping=True)
        event.listen(engine, "handle_error", _unavailable)
        return engine
    except ModuleNotFoundError as error:
        raise DatabaseUnavailable(
            "a PostgreSQL store needs psycopg, which is not installed; "
            "install it with: pip install 'weft[postgres]'"
        ) from error


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a transaction that writes; it commits on leaving, durably.

    On SQLite it takes the only write lock at once, so what it reads stays true until it commits.
    On PostgreSQL it must lock the rows that it decides by (:func:`lock`, ``with_for_update``).
    """
    with engine.connect() as connection:
        connection.execution_options(weft_writes=True)
        with connection.begin():
            yield connection


def lock(connection: Connection, what: str) -> None:
    """Hold the lock called ``what`` until the transaction of :func:`writing` ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))


def insert_missing(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert those of ``rows`` whose key is not in ``table`` yet; leave the others alone."""
    if rows:
        insert = _insert(connection)(table).on_conflict_do_nothing()
        connection.execute(insert, [dict(row) for row in rows])


def insert_or_update(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert ``rows``; where the primary key is there already, replace the other columns."""
    if rows:
        insert = _insert(connection)(table)
        keys = [column.name for column in table.primary_key]
        others = {c.name: insert.excluded[c.name] for c in table.columns if c.name not in keys}
        upsert = insert.on_conflict_do_update(index_elements=keys, set_=others)
        connection.execute(upsert, [dict(row) for row in rows])


def _insert(connection: Connection) -> Any:
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        # `from None`: the cause's message would show the url, password included
        raise BadDatabaseUrl(
            "cannot read the database url (not shown, it may hold a password); "
            "write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if address.drivername in ("postgresql", "postgres"):
        return address.set(drivername="postgresql+psycopg")
    if address.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise BadDatabaseUrl(
            f"the database must be sqlite or postgresql, got {address.drivername!r}; "
            "write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return address


def _place(address: URL) -> str:
    """Return where ``address`` points, without the parts that may hold a password."""
    shown = URL.create(
        address.get_backend_name(),
        host=address.host,
        port=address.port,
        database=address.database,
    )
    return shown.render_as_string()


def _unavailable(context: ExceptionContext) -> DatabaseUnavailable | None:
    """Return what an operational error is to our callers: no statement, no value, no password."""
    error = context.sqlalchemy_exception
    broken = isinstance(error, (OperationalError, InterfaceError)) or type(error) is DatabaseError
    if context.is_pre_ping or not broken:  # the other kinds are mistakes of ours
        return None
    reason = str(context.original_exception).strip().partition("\n")[0]
    place = _place(context.engine.url) if context.engine else "the database"
    if context.connection is None:
        return DatabaseUnavailable(f"cannot open the store at {place}: {reason}")
    return DatabaseUnavailable(
        f"the store at {place} failed: {reason}; see to its disk or its server. What was being "
        "written is undone, and a run can be resumed"
    )


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    # None: sqlite3 begins no transaction of its own; `_begin_sqlite` does.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{SQLITE_CACHE_KIB}")
    _use_write_ahead_log(connection)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL, where readers never wait; the file remembers it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
        # The switch needs the file alone and, unlike everything else, does not wait for it.
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("weft_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(REVISION_TABLE):
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {REVISION_TABLE}"))
    return found


def _upgrade(engine: Engine) -> None:
    # Imported here: a database that is up to date does not pay for alembic.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with _ALEMBIC, writing(engine) as connection:
        lock(connection, "weft schema")
        revision = _revision(connection)
        if revision is not None and revision not in known:
            raise NewerSchema(
                f"the store at {_place(engine.url)} was written by a newer weft "
                f"(schema {revision}); this one knows {HEAD}: upgrade weft"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
