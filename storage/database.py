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
    Column,
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Table,
    cast,
    create_engine,
    event,
    exists,
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

_DAMAGED = "the file is damaged, and its own message is no text"
_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic's `op` and `context` are globals of the process.
_ALEMBIC = threading.Lock()


class BadDatabaseUrl(ValueError):
    """The database url cannot be read, or names a database that weft does not use."""


class BadText(ValueError):
    """A text that no database can hold, and that therefore names nothing."""


class DatabaseUnavailable(ConnectionError):
    """The database cannot be reached, is none, or stopped working: what it was told is undone."""


class NewerSchema(RuntimeError):
    """The database was written by a newer weft."""


class OlderSchema(RuntimeError):
    """The database was written by an older weft, and must be upgraded first."""


def open_database(url: str) -> Engine:
    """Return an engine on the database at ``url``; a new one gets its tables.

    Two processes may open a new database at once: one creates it, the other waits.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://USER:PASSWORD@HOST/DATABASE``.

    Raises:
        BadDatabaseUrl: if the url is neither.
        DatabaseUnavailable: if there is no such server, or the file is not a database.
        NewerSchema: if a newer weft wrote it.
        OlderSchema: if an older weft wrote it.
    """
    engine = connect(url)
    try:
        found = revision(engine)
        if found is None:
            migrate(engine)
        elif found != HEAD:
            raise _other_schema(engine, found)
    except BaseException:
        engine.dispose()
        raise
    return engine


def revision(engine: Engine) -> str | None:
    """Return which schema a database has, or None if it has none yet.

    Raises:
        DatabaseUnavailable: if it cannot be read, or is no database.
    """
    try:
        with engine.connect() as connection:
            return _revision(connection)
    except DBAPIError as error:
        raise _cannot_open(engine, error) from error


def refuse_newer(engine: Engine) -> None:
    """Do nothing, unless a newer weft wrote the database.

    Raises:
        NewerSchema: if so.
    """
    found = revision(engine)
    if found is not None and found not in _known():
        raise _other_schema(engine, found)


def migrate(engine: Engine, to: str = "head") -> None:
    """Bring a database's tables up to a schema, in one transaction; later ones stay as they are.

    Raises:
        NewerSchema: if a newer weft wrote it.
        DatabaseUnavailable: if it cannot be written.
    """
    # Imported here: a database that is up to date does not pay for alembic.
    from alembic import command

    config = _alembic()
    try:
        with _ALEMBIC, writing(engine) as connection:
            lock(connection, "weft schema")
            found = _revision(connection)
            if found is not None and found not in _known():
                raise _other_schema(engine, found)
            config.attributes["connection"] = connection
            command.upgrade(config, to)
    except DBAPIError as error:
        raise _cannot_open(engine, error) from error


def connect(url: str) -> Engine:
    """Return an engine on the database at ``url``, whatever its tables are.

    On PostgreSQL each statement is a transaction of its own, but for :func:`writing` and
    :func:`reading`.

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
        return _watched(engine)
    try:
        # What only reads takes one exchange with the server, not three: no BEGIN and no ROLLBACK.
        return _watched(
            create_engine(
                address,
                pool_pre_ping=True,
                isolation_level="AUTOCOMMIT",
                skip_autocommit_rollback=True,
            )
        )
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
        if connection.dialect.name == "postgresql":
            connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that sees the database as it is now, whatever others write meanwhile."""
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


def lock(connection: Connection, what: str, shared: bool = False) -> None:
    """Hold the lock called ``what`` until the transaction of :func:`writing` ends.

    Any number may hold it ``shared``, while nobody holds it alone. On SQLite, who writes is alone.
    """
    if connection.dialect.name == "postgresql":
        take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
        connection.execute(select(take(func.hashtextextended(what, 0))))


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


def in_byte_order(connection: Connection, column: ColumnElement[str]) -> ColumnElement[str]:
    """Return a text column that sorts and compares as Python's ``sorted`` does, on any server."""
    return column.collate("C" if connection.dialect.name == "postgresql" else "BINARY")


def has_member(
    connection: Connection, column: Column[str], key: str, value: str
) -> ColumnElement[bool]:
    """Return whether the JSON object that is stored as text in ``column`` has this member."""
    if connection.dialect.name == "postgresql":
        return cast(column, postgresql.JSONB).contains({key: value})
    member = func.json_each(column).table_valued("key", "value")
    return exists().where(member.c.key == key, member.c.value == value)


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


def where(engine: Engine) -> str:
    """Return where a database is, without what may be a password."""
    return _place(engine.url)


def _place(address: URL) -> str:
    """Return where ``address`` points, without the parts that may hold a password."""
    shown = URL.create(
        address.get_backend_name(),
        host=address.host,
        port=address.port,
        database=address.database,
    )
    return shown.render_as_string()


def _watched(engine: Engine) -> Engine:
    event.listen(engine, "handle_error", _unavailable)
    event.listen(engine, "before_cursor_execute", _check_texts)
    return engine


def _check_texts(
    connection: Connection, cursor: Any, statement: str, parameters: Any, *rest: Any
) -> None:
    """Refuse what PostgreSQL or UTF-8 cannot hold before either says so in words of its own."""
    many = parameters if isinstance(parameters, list) else [parameters]
    for one in many:
        for value in one.values() if isinstance(one, Mapping) else one:
            if isinstance(value, str) and not _is_text(value):
                raise BadText(
                    f"a name or text must be UTF-8 without NUL characters, got {value[:60]!r}; "
                    "leave that character out"
                )


def _is_text(value: str) -> bool:
    if "\0" in value:
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _unavailable(context: ExceptionContext) -> DatabaseUnavailable | None:
    """Return what an operational error is to our callers: no statement, no value, no password."""
    error, original = context.sqlalchemy_exception, context.original_exception
    garbled = isinstance(original, UnicodeDecodeError)  # SQLite's message quotes a damaged file
    broken = isinstance(error, (OperationalError, InterfaceError)) or type(error) is DatabaseError
    if context.is_pre_ping or not (broken or garbled):  # the other kinds are mistakes of ours
        return None
    reason = _DAMAGED if garbled else str(original).strip().partition("\n")[0]
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
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{SQLITE_CACHE_KIB}")
        _use_write_ahead_log(connection)
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError(_DAMAGED) from error


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


def _alembic() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _known() -> set[str]:
    """Return every schema that this weft can bring up to date."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}


def _other_schema(engine: Engine, found: str) -> NewerSchema | OlderSchema:
    place = f"the store at {_place(engine.url)}"
    if found in _known():
        return OlderSchema(
            f"{place} was written by an older weft (schema {found}); this one needs {HEAD}: run "
            "weft store upgrade, which backs it up first"
        )
    return NewerSchema(
        f"{place} was written by a newer weft (schema {found}); this one knows {HEAD}: upgrade weft"
    )


def _cannot_open(engine: Engine, error: DBAPIError) -> DatabaseUnavailable:
    reason = str(error.orig).strip().partition("\n")[0]
    return DatabaseUnavailable(f"cannot open the store at {_place(engine.url)}: {reason}")
