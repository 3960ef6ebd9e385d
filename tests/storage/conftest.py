"""Stores on SQLite and on a real PostgreSQL server; both run every test of store and ledger."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from storage import database
from storage.blobs import BlobStore
from storage.database import migrate, open_database
from storage.ledger import ClientRecord, Ledger
from storage.schema import metadata
from storage.store import AdapterStore


@pytest.fixture(autouse=True)
def migrated_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a new database as weft does, whatever tests elsewhere do with it."""
    monkeypatch.setattr(database, "migrate", migrate)


@pytest.fixture(scope="session")
def postgres_databases(postgres_server: Any) -> Any:
    """The shared server with two databases more: `empty`, and `weft` with our schema.

    Emptying one takes a fifth of the time that making one takes, and most tests here want one.
    """
    postgres_server.run("CREATE DATABASE empty")
    postgres_server.run("CREATE DATABASE weft")
    open_database(postgres_server.of("weft")).dispose()
    return postgres_server


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
    server = request.getfixturevalue("postgres_databases")
    server.run("DROP SCHEMA public CASCADE", "empty")
    server.run("CREATE SCHEMA public", "empty")
    return str(server.of("empty"))


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
    server = request.getfixturevalue("postgres_databases")
    server.run(f"TRUNCATE {', '.join(metadata.tables)}", "weft")
    return str(server.of("weft"))


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


@pytest.fixture
def clinic() -> Callable[..., ClientRecord]:
    """Makes the record of a client."""

    def make(name: str = "clinic-7", **changes: Any) -> ClientRecord:
        record = ClientRecord(
            name=name,
            data="jsonl:/data/notes.jsonl",
            population="patients",
            fields={"text": "note", "label": "dx"},
            num_examples=5310,
            epsilon=8.0,
            delta=1e-5,
            labels={"gpu": "a100"},
        )
        return replace(record, **changes)

    return make
