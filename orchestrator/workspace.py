"""A weft home: where the store, the ledger and the clients' private state live."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from storage.blobs import BlobStore
from storage.buckets import open_place
from storage.cache import DEFAULT_LIMIT, Cache, parse_limit
from storage.database import open_database
from storage.ledger import Ledger
from storage.places import Folder
from storage.store import AdapterStore


@dataclass(frozen=True, slots=True)
class Workspace:
    """A weft home: its store, its ledger, and the folder both live in.

    Attributes:
        home: folder of blobs, spilled updates and the clients' private state.
        store: versions.
        ledger: runs, clients and privacy spends.
        engine: the database under both.
        blobs: the tensors under the store, in ``home`` or elsewhere.
    """

    home: Path
    store: AdapterStore
    ledger: Ledger
    engine: Engine
    blobs: BlobStore

    @property
    def sites(self) -> Path:
        """Folder of the clients' private state, which plays their sites."""
        return self.home / "sites"

    def close(self) -> None:
        """Give the database's connections back."""
        self.engine.dispose()


def open_workspace(
    home: str | Path | None = None, database: str | None = None, blobs: str | None = None
) -> Workspace:
    """Open the workspace, creating it where it does not exist.

    Args:
        home: folder; by default ``$WEFT_HOME``, else ``.weft``.
        database: SQLAlchemy URL; by default ``$WEFT_DATABASE``, else SQLite in ``home``.
        blobs: folder or url of the tensors; by default ``$WEFT_BLOBS``, else a folder in ``home``.
            What lies elsewhere is cached in ``home``, up to ``$WEFT_BLOB_CACHE`` (20GiB).

    Raises:
        NewerSchema, OlderSchema: if another weft wrote the database.
        BadBlobsUrl, BlobsUnavailable: if there can be no blobs there.
        BadCacheLimit: if the cache's limit is no size.
    """
    folder, url = place_of(home, database)
    stored = open_blobs(folder, blobs)
    engine = open_database(url)
    return Workspace(folder, AdapterStore(engine, stored), Ledger(engine), engine, stored)


def place_of(home: str | Path | None = None, database: str | None = None) -> tuple[Path, str]:
    """Return a workspace's folder, which is made, and the url of its database."""
    folder = home_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, database or os.environ.get("WEFT_DATABASE") or f"sqlite:///{folder / 'weft.db'}"


def open_blobs(home: Path, blobs: str | None = None) -> BlobStore:
    """Return the blobs of a home; see :func:`open_workspace`.

    Raises:
        BadBlobsUrl, BlobsUnavailable: if there can be none there.
        BadCacheLimit: if the cache's limit is no size.
    """
    place = open_place(blobs or os.environ.get("WEFT_BLOBS") or home / "blobs")
    limit = parse_limit(os.environ.get("WEFT_BLOB_CACHE") or DEFAULT_LIMIT)
    if isinstance(place, Folder) or limit == 0:
        return BlobStore(place)
    return BlobStore(place, Cache(home / "cache" / "blobs", limit))


def home_folder(home: str | Path | None = None) -> Path:
    """Return where the workspace is: ``home``, else ``$WEFT_HOME``, else ``.weft``."""
    return Path(home or os.environ.get("WEFT_HOME") or ".weft").absolute()
